"""Parts of ``validate.py``: arguments, and what its demo prints and draws."""
