"""What differs between systems: how Python is started, and the modules that only POSIX has."""
