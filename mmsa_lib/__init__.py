"""Methods, corpora and honest evaluation for multimodal sentiment analysis.

The package is imported a piece at a time (``from mmsa_lib import corpora``), so that
the light parts start without loading torch. ``mmsa_lib.predict([clip, ...])`` scores
video files, see `mmsa_lib.methods.readout.predict`.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    # the press knows that this is executed only where the name is asked for (closure)
    if name == "predict":
        from mmsa_lib.methods.readout import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
