"""Table 11 of the paper: what indexing and a query cost on this machine."""
from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import normalize

from extras.bench import median_seconds
from extras.paper import COST, markdown
from train import autocast
from video_colbert import VideoColBERT, mean_max_sim

@torch.no_grad()
def cost_table(s, device, gallery=1000, videos=8, repeat=19):
    """Table 11 as Markdown, with random weights and pixels."""
    model = VideoColBERT(replace(s, pretrained=None)).to(device).eval()
    size, d, N = model.image_size, model.width, s.num_frames
    frames = torch.randint(0, 256, (videos, N, 3, size, size), dtype=torch.uint8).to(device)
    images = (frames.flatten(0, 1).float() - model.mean) / model.std
    ids = torch.randint(2, 30000, (1, model.num_tokens), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    F = normalize(torch.randn(gallery, N, d, device=device), dim=-1)
    V = normalize(torch.randn(gallery, N + s.visual_expansion, d, device=device), dim=-1)

    def answer(*levels):
        Q = model.encode_query(ids)
        return sum(mean_max_sim(Q, level, mask) for level in levels).topk(10)

    # The calls take turns, so that a busy machine is busy for all of them.
    calls = [partial(model.backbone.visual, images), partial(model.encode_video, frames),
             partial(answer, F), partial(answer, V), partial(answer, F, V)]
    with autocast(device, s.precision):
        costs = [1000 * seconds for seconds in median_seconds(device, *calls, repeat=repeat)]
    frame_cost, video_cost = costs[0] / videos, costs[1] / videos
    lines = []
    for name, index_cost, query_cost in (("MMS_F", frame_cost, costs[2]),
                                         ("MMS_V", video_cost, costs[3]),
                                         ("MMS_FV", video_cost, costs[4])):
        lines.append([name, f"{index_cost:.2f}", f"{query_cost:.2f}", COST[name]])
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    header = ["", "indexing, ms per video", "query, ms", "the paper's, on an A5000, and R@1"]
    return (f"Table 11: cost. {s.backbone}, {N} frames, {videos} videos at a time, query "
            f"against {gallery} videos; {machine}, {torch.get_num_threads()} threads, torch "
            f"{torch.__version__}\n\n{markdown(header, lines)}")
