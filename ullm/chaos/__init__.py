"""Seeded chaos against a live server: random faults under load, then a check that nothing was lost.

`catalogue` holds the requests, `chaos_client` sends one and records everything that comes back; `world` is
what faults act on; `signal_faults`, `client_faults`, `operation_faults` and `planned_faults` are the faults;
`chaos_plan` is what is asked for, and `schedule` draws from the seed what will happen; `load_verdicts`
and `verify` judge the end; `chaos_run` puts them together, `chaos_report` writes the report. Everything is
done from outside, by HTTP and signals. Imports errors, system, faults, client, bench and testing.
"""
