"""Parts of ``visualize.py``: arguments, what is drawn, the figures, their captions and the page."""
