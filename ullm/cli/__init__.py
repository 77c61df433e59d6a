"""The commands of ``ullm``, one module each, imported when the command runs."""
