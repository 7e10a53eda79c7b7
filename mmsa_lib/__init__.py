"""Methods, corpora and honest evaluation for multimodal sentiment analysis.

The package is imported a piece at a time (``from mmsa_lib import corpora``), so that
the light parts start without loading torch. ``from mmsa_lib.predict import predict``
scores video files.
"""

__version__ = "0.1.0"
