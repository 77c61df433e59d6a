"""Entry points at the module paths of other engines, so that their command lines work here."""
