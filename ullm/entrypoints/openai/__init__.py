"""Entry points that users of other engines know."""
