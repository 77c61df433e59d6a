"""The plugin's fixtures, also where ullm was installed before it had a plugin."""

from ullm.testing.plugin import ullm_clock as ullm_clock
from ullm.testing.plugin import ullm_engine as ullm_engine
from ullm.testing.plugin import ullm_faults as ullm_faults
from ullm.testing.plugin import ullm_no_leaks as ullm_no_leaks
from ullm.testing.plugin import ullm_scripted_model as ullm_scripted_model
from ullm.testing.plugin import ullm_server as ullm_server
from ullm.testing.plugin import ullm_tiny_model as ullm_tiny_model
