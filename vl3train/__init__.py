"""vl3train trains VideoLLaMA3 (arXiv:2501.13106) through its four stages, on images, videos and text."""

__version__ = "0.1.0"
