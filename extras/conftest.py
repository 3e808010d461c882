"""The fixtures of the core's tests, for the tests of this folder."""
from test_video_colbert import data, seed, tiny  # noqa: F401
