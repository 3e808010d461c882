"""Frames of long videos: the same as the core's, sooner, because it seeks to each of them."""
import numpy as np
import torch

from video_colbert import frame_times, frames_at, sample_times

def seek_frames(path, times, wanted, size):
    """The same as frames_at. If the frames are hundreds of frames apart, each is reached by a
    seek of its own; otherwise all between them are decoded."""
    first, last = np.searchsorted(times[0], [wanted[0], wanted[-1]])
    if last - first <= 500 * len(wanted):
        return frames_at(path, times, wanted, size)
    return torch.cat([frames_at(path, times, [time], size) for time in wanted])

def sample_long_video(path, num_frames, size, start=0.0, end=None):
    """The same as sample_frames."""
    times = frame_times(path)
    return seek_frames(path, times, sample_times(path, times, num_frames, start, end), size)
