"""TLS: certificates and keys, read with errors that name the option, and the connections between hosts."""
