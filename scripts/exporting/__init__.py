"""Parts of ``export.py``."""
