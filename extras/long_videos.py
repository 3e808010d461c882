"""Frames of long videos: the same as the core's, sooner, because it seeks to each of them."""
import numpy as np
import torch

from video_colbert import frame_times, frames_at, sample_times

def seek_frames(path, timing, wanted, size):
    """The same as frames_at. If the frames are hundreds of frames apart, and the format allows
    it, each is reached by a seek of its own; otherwise all between them are decoded."""
    first, last = np.searchsorted(timing.times, [wanted[0], wanted[-1]])
    if not timing.pts_are_reliable or last - first <= 500 * len(wanted):
        return frames_at(path, timing, wanted, size)
    return torch.cat([frames_at(path, timing, [time], size) for time in wanted])

def sample_long_video(path, num_frames, size, start=0.0, end=None):
    """The same as sample_frames."""
    timing = frame_times(path)
    wanted = sample_times(path, timing, num_frames, start, end)
    return seek_frames(path, timing, wanted, size)
