"""Video-ColBERT (CVPR 2025): text-to-video retrieval by contextualised late interaction, in one file.

    model = VideoColBERT(Config())                                      # CLIP ViT-B/32 and the paper's MSR-VTT settings
    frames = torch.stack([sample_frames(path, 12, 224) for path in paths])
    F, V = model.encode_video(frames)                                   # before and after the temporal transformer
    ids, mask = model.tokenize(["a man feeds a dog"])
    Q = model.encode_query(ids, mask)
    scores = mean_max_sim(Q, F, mask) + mean_max_sim(Q, V, mask)        # (queries, videos), equation 5

Shapes: A queries, B videos, M query tokens, N frames, E visual expansion tokens, d joint embedding width.
In the paper's order: settings, interaction (4.1), loss (4.3), encoders and temporal transformer (4.1, 4.2), then
what surrounds them: frames from a file (5.2), metrics (5.3), Figure 4.
"""
import argparse
import copy
import difflib
import hashlib
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

import av
import numpy as np
import open_clip
import safetensors.torch
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm


# ---------------------------------------------------------------------------------------------------------------------
# Settings. Defaults are the paper's for MSR-VTT with CLIP-B/32. The comment of a field is its --help in train.py.

@dataclass
class Config:
    backbone: str = "ViT-B-32-quickgelu"    # open_clip model (section 5.2), or "tiny", small enough to train on a CPU
    pretrained: str | None = "auto"         # open_clip tag, weights file or none; auto: OpenAI's CLIP, WebLI's SigLIP (5.2)
    num_frames: int = 12                    # frames a video (section 5.2, Table 7)
    num_tokens: int = 32                    # tokens a query (section 5.2); SigLIP always uses its own 64
    pad_token: int = 0                      # id that fills a CLIP query up to its length, 0 is "!" (Table 12)
    query_augmentation: bool = True         # pad tokens take part in MeanMaxSim (section 4.2, Table 5)
    temporal_layers: int = 4                # depth of the temporal transformer (section 5.2, Table 8)
    visual_expansion: int = 2               # E, learned tokens beside the frames (sections 4.2, 5.2)
    interaction: str = "mms"                # mms, MeanMaxSim, or mp, one mean-pooled vector each side (equation 1, Table 3)
    loss: str = "sigmoid"                   # sigmoid or infonce (section 4.3, Table 4)
    loss_form: str = "dual"                 # dual (equation 7) or combined, one loss on the sum (section 6, Table 4)
    lambda_frame: float = 1.0               # weight of the loss on MMS_F (equation 7, section 5.2)
    lambda_video: float = 1.0               # weight of the loss on MMS_V (equation 7, section 5.2)
    logit_scale: float = 4.77               # log t of equation 6, SigLIP's (section 6)
    logit_bias: float = -12.93              # b of equation 6, SigLIP's (section 6)
    learn_scale: bool = False               # train log t and b; the paper fixes them (section 6)
    freeze: bool = True                     # positions, patch and token embeddings stay as pre-trained (section 5.2)


# ---------------------------------------------------------------------------------------------------------------------
# Interaction (section 4.1)

def mean_max_sim(Q, V, mask=None):
    """Every query against every video, equations 3 and 4: the mean over query tokens of the best frame's similarity.

    Q (A, M, d), V (B, N, d), optional bool mask (A, M) of the tokens that count -> (A, B), float32 at least.
    Vectors are used as they come: unit vectors make the result a mean of cosines. Neither pass holds (A, B, M, N).
    """
    def block(q, v, w):                                                     # (a, M, d), (b, N, d), (a, M)
        first, *others = v.unbind(1)                                        # N times (b, d)
        best = q @ first.T                                                  # (a, M, b)
        for frame in others:
            best.clamp_(min=q @ frame.T)                                    # max over n
        return (w[:, None] @ best).squeeze(1)                               # (a, b), mean over m

    with torch.autocast(Q.device.type, enabled=False):                      # bf16 would round x before t = 118 scales it
        Q, V = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (Q, V))
        W = torch.ones_like(Q[..., 0]) if mask is None else mask.to(Q.dtype)
        W = W / W.sum(1, keepdim=True)                                      # (A, M), 1/M over the tokens that count
        b = min(len(V), 1024) or 1
        size = 2 ** 22 if torch.is_grad_enabled() else 2 ** 24              # products at a time, in a backward pass all are held
        a = max(1, size // (b * Q.shape[1] * V.shape[1]))
        return torch.cat([torch.cat([
            checkpoint(block, q, v, w, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else block(q, v, w)
            for v in V.split(b)], dim=1) for q, w in zip(Q.split(a), W.split(a))])


# ---------------------------------------------------------------------------------------------------------------------
# Losses (section 4.3). `positives` is bool (A, B), default the diagonal; `logit_scale` is log t, as SigLIP stores it.

def sigmoid_loss(sim, positives=None, logit_scale=4.77, logit_bias=-12.93):
    """Equation 6 on similarities (A, B) -> scalar, the mean over queries of the sum over videos.

    The bias enters as `t x + b` within the log sigmoid, as in SigLIP's released code; the paper's print has `-t x + b`.
    """
    if positives is None:
        positives = torch.eye(*sim.shape, dtype=torch.bool, device=sim.device)
    z = torch.where(positives, 1.0, -1.0)                                   # (A, B)
    t = torch.as_tensor(logit_scale, dtype=sim.dtype, device=sim.device).exp()          # 4.77 is log t, t = 117.9
    return -logsigmoid(z * (t * sim + logit_bias)).sum() / len(sim)         # over B, not B squared


def info_nce_loss(sim, positives=None, logit_scale=4.6052):
    """The baseline of section 4.3 on similarities (A, B) -> scalar: cross entropy over rows and columns, averaged.

    Several positives in a row (or column) share its target evenly; each row and column needs one.
    """
    if positives is None:
        positives = torch.eye(*sim.shape, dtype=torch.bool, device=sim.device)
    y, logits = positives.to(sim.dtype), torch.as_tensor(logit_scale, dtype=sim.dtype, device=sim.device).exp() * sim
    return (cross_entropy(logits, y / y.sum(1, keepdim=True)) + cross_entropy(logits.T, y.T / y.T.sum(1, keepdim=True))) / 2


def dual_loss(sim_F, sim_V, positives=None, loss=sigmoid_loss, lambda_frame=1.0, lambda_video=1.0, **scale):
    """Equation 7: one loss on MMS_F and one on MMS_V, both (A, B), so that each level stands alone."""
    return lambda_frame * loss(sim_F, positives, **scale) + lambda_video * loss(sim_V, positives, **scale)


def combined_loss(sim_F, sim_V, positives=None, loss=sigmoid_loss, **scale):
    """The ablation of Table 4: one loss on MMS_FV = MMS_F + MMS_V, both (A, B)."""
    return loss(sim_F + sim_V, positives, **scale)


# ---------------------------------------------------------------------------------------------------------------------
# Model (sections 4.1, 4.2, 5.2)

TINY = dict(embed_dim=64,                                                   # for the embedded data and for tests
            vision_cfg=dict(image_size=64, patch_size=16, width=64, layers=2, head_width=32),
            text_cfg=dict(width=64, heads=2, layers=2))


def load_backbone(name, pretrained):
    """open_clip model by name -> (model, mean (3,), std (3,)). No weights, unknown names and tags raise ValueError."""
    if name == "tiny":
        clip = open_clip.CustomTextCLIP(**TINY)
        clip.visual.positional_embedding.data *= 4                          # else the patches drown them, from scratch
        return clip, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, ["tiny", *open_clip.list_models()], n=5, cutoff=0.4)
        raise ValueError(f"unknown backbone {name!r}; near names: {', '.join(near)}")
    config = open_clip.get_model_config(name)
    config.pop("custom_text", None)
    if "multimodal_cfg" in config or "hf_model_name" in config["text_cfg"] or isinstance(config["vision_cfg"].get("layers"), list):
        raise ValueError(f"backbone {name!r} is not a CLIP or SigLIP vision transformer with open_clip's own text encoder")
    tags = open_clip.list_pretrained_tags_by_model(name)
    default = next((tag for tag in ("openai", "webli") if tag in tags), None)
    tag = default if pretrained == "auto" else pretrained
    source = open_clip.get_pretrained_cfg(name, tag if tag in tags else default or "")
    clip = open_clip.CustomTextCLIP(**config)
    if pretrained is not None:
        if tag in tags:
            if source.get("quick_gelu", False) != config.get("quick_gelu", False):     # silently costs accuracy
                raise ValueError(f"weights {tag!r} and backbone {name!r} differ in QuickGELU; use the name with -quickgelu")
            try:
                path = open_clip.download_pretrained(source)
            except Exception as error:                                      # any failure of the hub, the network or the disk
                raise ValueError(f"no weights for {name} {tag!r}: fetch {source.get('hf_hub') or source['url']} "
                                 f"and pass --pretrained PATH ({str(error).splitlines()[0]})") from None
        elif tag and os.path.isfile(tag):
            path = tag
        else:
            raise ValueError(f"no weights {pretrained!r} for {name}: give a file, none, or one of {', '.join(tags) or '(no tags)'}")
        try:
            open_clip.load_checkpoint(clip, path)
        except Exception as error:
            raise ValueError(f"{path} does not hold the weights of {name} ({str(error).splitlines()[0]})") from None
    return clip, source.get("mean", open_clip.OPENAI_DATASET_MEAN), source.get("std", open_clip.OPENAI_DATASET_STD)


def write_whole(path, *parts):
    """Write bytes to a file whole or not at all: temporary file, flush, rename. Raises OSError and leaves nothing behind."""
    temporary = Path(f"{path}.part")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


FROZEN = ("text.positional_embedding", "text.token_embedding",              # positions, tokens and patches (section 5.2)
          "visual.positional_embedding", "visual.conv1", "visual.trunk.pos_embed", "visual.trunk.patch_embed")


class VideoColBERT(nn.Module):
    """Query encoder, frame encoder and temporal transformer of Figure 2, with the training loss.

    Everything works on unit vectors in float32, also under autocast. `image_size` is the side of the frames in pixels.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        for name, choice in dict(interaction=("mms", "mp"), loss=("sigmoid", "infonce"), loss_form=("dual", "combined")).items():
            if getattr(config, name) not in choice:
                raise ValueError(f"{name} must be {' or '.join(choice)}, not {getattr(config, name)}")
        self.clip, mean, std = load_backbone(config.backbone, config.pretrained)
        self.clip.logit_scale = self.clip.logit_bias = None                 # ours are below
        text, self.image_size = self.clip.text, self.clip.visual.image_size[0]
        width, d = text.positional_embedding.shape[1], text.output_dim
        if width != d:
            raise ValueError(f"backbone {config.backbone!r}: the text encoder's layers are {width} wide, its output {d}; "
                             "the temporal transformer needs both alike")
        self.is_siglip = text.pool_type == "last"                           # bidirectional, pads to all its positions
        self.num_tokens = text.context_length if self.is_siglip else config.num_tokens
        if not 3 <= self.num_tokens <= text.context_length:
            raise ValueError(f"num_tokens must be 3 to {text.context_length} for {config.backbone}, not {config.num_tokens}")
        if min(config.num_frames, config.temporal_layers) < 1 or config.visual_expansion < 0:
            raise ValueError("num_frames and temporal_layers must be at least 1, visual_expansion at least 0")
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

        # Same width, heads and activation as the text encoder, and its first layers' weights (the paper is silent on
        # the weights; CLIP4Clip, X-CLIP and DRL do so). A stack deeper than the text encoder starts over.
        blocks = text.transformer.resblocks
        self.temporal = nn.ModuleList(copy.deepcopy(blocks[i % len(blocks)]) for i in range(config.temporal_layers))
        size = 0.9 if config.backbone == "tiny" else 0.3                    # about the features' own, smaller ones drown in them
        self.frame_positions = nn.Parameter(size * torch.randn(config.num_frames, d))
        self.visual_expansion = nn.Parameter(0.02 * torch.randn(config.visual_expansion, d))
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale), requires_grad=config.learn_scale)
        self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias), requires_grad=config.learn_scale)
        for name, p in self.clip.named_parameters():
            p.requires_grad = not (config.freeze and name.startswith(FROZEN))

    # -- query side (section 5.2)

    @cached_property
    def tokenizer(self):
        if self.config.backbone == "tiny":
            return open_clip.SimpleTokenizer()
        try:
            return open_clip.get_tokenizer(self.config.backbone)
        except Exception as error:                                          # SigLIP's comes from the hub on first use
            name = open_clip.get_model_config(self.config.backbone)["text_cfg"].get("hf_tokenizer_name")
            raise ValueError(f"no tokenizer {name}: fetch it once with a network ({str(error).splitlines()[0]})") from None

    def real_tokens(self, ids):
        """ids (A, M) -> bool (A, M): start, words and end, not the pads."""
        end = self.tokenizer.tokenizer.eos_token_id if self.is_siglip else self.tokenizer.eot_token_id
        return torch.arange(ids.shape[1], device=ids.device) <= (ids == end).int().argmax(1, keepdim=True)

    def tokenize(self, texts):
        """list of A str -> ids int64 (A, M), mask bool (A, M) of the tokens that MeanMaxSim averages over.

        With query augmentation these are all M, with mean pooling the one whose output CLIP or SigLIP pools. A caption
        that is too long is cut and keeps its end token.
        """
        ids = self.tokenizer(texts, context_length=self.num_tokens)         # (A, M)
        real = self.real_tokens(ids)
        if not self.is_siglip:
            ids = ids.where(real, self.config.pad_token)
        if self.config.interaction == "mp":
            last = torch.full_like(ids[:, 0], self.num_tokens - 1) if self.is_siglip else real.sum(1) - 1
            return ids, torch.arange(ids.shape[1]) == last[:, None]
        return ids, real | self.config.query_augmentation

    def encode_query(self, ids, mask):
        """ids (A, M), mask (A, M) from tokenize -> Q float32 (A, M, d), unit vectors, 0 where the mask is False.

        open_clip keeps one token's output, here each goes through the final norm and the projection. Pads follow the
        words, so under CLIP's causal mask no word sees them; SigLIP always attends to them.
        """
        text, M = self.clip.text, ids.shape[1]
        x = text.token_embedding(ids) + text.positional_embedding[:M]       # (A, M, width)
        x = text.transformer(x, attn_mask=None if text.attn_mask is None else text.attn_mask[:M, :M])
        x = text.ln_final(x)
        x = text.text_projection(x) if isinstance(text.text_projection, nn.Linear) else x @ text.text_projection
        return normalize(x.float(), dim=-1) * mask[..., None]               # (A, M, d)

    # -- video side (sections 4.1, 4.2)

    def encode_video(self, frames):
        """uint8 frames (B, N, 3, image_size, image_size), RGB -> F (B, N, d), V (B, N + E, d), float32 unit vectors.

        N is at most config.num_frames. Anything else raises ValueError.
        """
        N, size = self.config.num_frames, self.image_size
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[2:] != (3, size, size) or not 1 <= frames.shape[1] <= N:
            raise ValueError(f"frames must be uint8 (B, 1 to {N}, 3, {size}, {size}), not "
                             f"{str(frames.dtype).removeprefix('torch.')} {tuple(frames.shape)}")
        x = frames.flatten(0, 1).float().sub_(self.mean).div_(self.std)     # (B N, 3, H, W), the paper's resize is done before
        return self.contextualize(self.clip.visual(x).unflatten(0, frames.shape[:2]))       # [CLS] or SigLIP's attention pool

    def contextualize(self, f):
        """The image encoder's output f (B, N, d) -> F (B, N, d), V (B, N + E, d), float32 unit vectors."""
        e = self.visual_expansion.expand(len(f), -1, -1)                    # (B, E, d)
        x = torch.cat([f + self.frame_positions[:f.shape[1]], e], dim=1)    # (B, N + E, d)
        for block in self.temporal:                                         # no causal mask: every frame sees every frame
            x = block(x)
        x = x + torch.cat([f, e], dim=1)                                    # residual around it all, as CLIP4Clip has (paper silent)
        return normalize(f.float(), dim=-1), normalize(x.float(), dim=-1)

    # -- training

    def similarities(self, Q, mask, F, V):
        """Q (A, M, d), mask (A, M), F (B, N, d), V (B, N + E, d) -> MMS_F, MMS_V (A, B), or MP on either (equation 1)."""
        if self.config.interaction == "mp":                                 # the one token of the mask, the mean of the frames
            F, V = (normalize(x[:, :F.shape[1]].mean(1, keepdim=True), dim=-1) for x in (F, V))
        return mean_max_sim(Q, F, mask), mean_max_sim(Q, V, mask)

    def loss(self, Q, mask, F, V, positives=None):
        """The same and bool positives (A, B) -> loss, and the similarities on F and V (A, B)."""
        c = self.config
        sim_F, sim_V = self.similarities(Q, mask, F, V)
        loss, scale = info_nce_loss, dict(logit_scale=self.logit_scale)
        if c.loss == "sigmoid":
            loss, scale = sigmoid_loss, dict(scale, logit_bias=self.logit_bias)
        if c.loss_form == "dual":
            return dual_loss(sim_F, sim_V, positives, loss, c.lambda_frame, c.lambda_video, **scale), sim_F, sim_V
        return combined_loss(sim_F, sim_V, positives, loss, **scale), sim_F, sim_V

    def forward(self, ids, mask, frames, positives=None):
        """A batch's training loss, with MMS_F and MMS_V (A, B); arguments as above."""
        return self.loss(self.encode_query(ids, mask), mask, *self.encode_video(frames), positives)

    # -- a model is a folder with config.json and model.safetensors

    def save(self, folder):
        """Write config.json and model.safetensors into `folder`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()}
        config = {f.name: getattr(self.config, f.name) for f in fields(Config)}
        write_whole(folder / "model.safetensors", safetensors.torch.save(weights))
        write_whole(folder / "config.json", json.dumps(config, indent=2).encode())

    @classmethod
    def load(cls, folder):
        """The model that save wrote, in eval mode. Raises ValueError where the folder does not hold one."""
        folder = Path(folder)
        try:
            config = Config(**json.loads((folder / "config.json").read_text()))
            model = cls(replace(config, pretrained=None))                   # weights come from the folder, not from the hub
            model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        except (OSError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} does not hold a model: {str(error).splitlines()[0]}") from None
        model.config = config
        return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Frames of a file (section 5.2)

def frame_times(path):
    """When a video shows its frames: times in ticks, sorted, the end of the last, seconds a tick, and whether ticks are pts.

    From the packets, for headers lie. Raises ValueError where there is no frame, OSError or av.FFmpegError where no video.
    """
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("no video stream")
        if stream.codec_context is None:
            raise ValueError("its codec is unknown")
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        times, rate = sorted(p.pts for p in packets if p.pts is not None), stream.average_rate or 25
        if 0 < len(times) == len(packets):
            length = max(packets, key=lambda p: p.pts).duration or (times[-1] - times[0]) // len(times) or 1
            return times, times[-1] + length, float(stream.time_base), True
    with av.open(str(path)) as container:                                   # a raw stream has no clock: frames are its ticks
        count = sum(1 for _ in container.decode(container.streams.best("video")))
    if count == 0:
        raise ValueError("no frames")
    return list(range(count)), count, float(1 / rate), False


def sample_frames(path, num_frames, size, seconds=0.0):
    """TSN-style sampling: the frame on screen at the middle of each of `num_frames` equal segments of the clip.

    -> uint8 (num_frames, 3, size, size), RGB, resized without keeping the aspect ratio, turned as the file says. A clip
    with fewer frames repeats them. Segments are equal in time, so that a variable frame rate is sampled as it is seen.
    `seconds` takes the clip's beginning alone. Raises ValueError, which names the file, where no frame can be had.
    """
    def rgb(frame):                                                         # square, so turning comes to the same after it
        pixels = frame.to_ndarray(width=size, height=size, format="rgb24", interpolation="BICUBIC")
        return np.rot90(pixels, round(frame.rotation / 90))                 # (size, size, 3)

    try:
        times, end, tick, clocked = frame_times(path)
        end = min(end, times[0] + seconds / tick) if seconds else end
        middles = times[0] + (np.arange(num_frames) + 0.5) / num_frames * (end - times[0])
        wanted = np.array(times)[np.searchsorted(times, middles, side="right") - 1]     # (num_frames,), in order

        frames, shown = [], None
        with av.open(str(path)) as container:
            for i, frame in enumerate(container.decode(container.streams.best("video"))):
                now = frame.pts if clocked else i
                if now is None:                                             # a damaged one
                    continue
                while shown and len(frames) < num_frames and wanted[len(frames)] < now:
                    frames.append(rgb(shown))
                if len(frames) == num_frames:
                    break
                shown = frame
        if shown is None:
            raise ValueError("no frame can be decoded")
        frames += [rgb(shown)] * (num_frames - len(frames))
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()          # (N, 3, size, size)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics (section 5.3)

def retrieval_metrics(sim, target):
    """sim (A, B), int target (A,), the one relevant video of each query -> dict of floats.

    R@1, R@5, R@10 in percent, nDCG@10 in 0..1, median and mean rank MdR and MnR. A tie counts against the model: a rank
    is the number of videos that score at least as high. Raises ValueError for NaN and for no queries.
    """
    sim, target = torch.as_tensor(sim), torch.as_tensor(target, dtype=torch.int64)
    if sim.isnan().any():
        raise ValueError("the similarities hold NaN")
    if len(sim) == 0:
        raise ValueError("no queries to evaluate")
    rank = (sim >= sim.gather(1, target[:, None])).sum(1).double()          # (A,), 1 is best
    return {**{f"R@{k}": 100 * (rank <= k).double().mean().item() for k in (1, 5, 10)},
            "nDCG@10": torch.where(rank <= 10, 1 / torch.log2(1 + rank), 0).mean().item(),
            "MdR": rank.quantile(0.5).item(), "MnR": rank.mean().item()}


def video_to_text(sim, target):
    """sim (A, B) and the video of each query (A,) -> similarities and targets the other way, for retrieval_metrics.

    As the field has it since CLIP4Clip: a video's captions stand together, and the group scores as its best one.
    """
    videos, group = torch.as_tensor(target).unique(return_inverse=True)     # (G,), (A,)
    best = sim.new_full((len(videos), sim.shape[1]), -torch.inf).scatter_reduce(
        0, group[:, None].expand_as(sim), sim, "amax")                      # (G, B)
    return best.T[videos], torch.arange(len(videos))                        # (G, G)


def reciprocal_rank_fusion(sim_F, sim_V, k=60):
    """The two rankings (A, B) fused by 1 / (k + rank) instead of the sum of scores (section 6, Table 3) -> (A, B)."""
    def rank(sim):                                                          # 1 is best; a tie has its worst rank
        return sim.shape[1] - torch.searchsorted(sim.sort(1).values, sim.contiguous())
    return 1 / (k + rank(sim_F).double()) + 1 / (k + rank(sim_V).double())


# ---------------------------------------------------------------------------------------------------------------------
# Figure 4: which frame does each word pick, before and after the temporal transformer?

@torch.no_grad()
def interactions(model, query, frames):
    """query str, uint8 frames (N, 3, S, S) -> its W words, their similarity to the frames (W, N) before and after.

    A word of several tokens has their mean. As in the paper's figure, expansion tokens of either side take no part.
    """
    F, V = model.encode_video(frames[None].to(model.mean.device))           # (1, N, d), (1, N + E, d)
    special = int(model.real_tokens(model.tokenize([""])[0]).sum())         # start and end, or end alone
    ids, mask = (x.to(F.device) for x in model.tokenize([query]))
    real = model.real_tokens(ids)
    Q = model.encode_query(ids, real)[0, special - 1:int(real.sum()) - 1]   # (T, d), the words' tokens
    words = query.split()
    lengths = model.real_tokens(model.tokenize(words)[0]).sum(1) - special  # (W,), tokens a word
    spans = [Q[end - n:end] for n, end in zip(lengths.tolist(), lengths.cumsum(0).tolist())]
    kept = [(word, q.mean(0)) for word, q in zip(words, spans) if len(q)]   # a caption may be cut
    W = torch.stack([q for _, q in kept]) if kept else Q[:0]                # (W, d)
    return [word for word, _ in kept], W @ F[0].T, W @ V[0, :len(frames)].T


def draw_interactions(rows, side=96):
    """rows of (title, words, frames (N, 3, S, S), before (W, N), after (W, N)) -> PIL image.

    For each row a strip of frames; above a frame the words that pick it before, below it those that do after, with
    their similarities.
    """
    line, left, font = 18, 70, ImageFont.load_default(12)
    layout = []
    for _, words, frames, before, after in rows:
        columns = [[[f"{word[:10]} {x:.2f}" for word, n, x in zip(words, sim.argmax(1).tolist(), sim.amax(1).tolist()) if n == k]
                    for k in range(len(frames))] for sim in (before, after)]
        layout.append((columns, [max(map(len, column)) * line for column in columns]))
    width = left + max((len(row[2]) for row in rows)) * side
    image = Image.new("RGB", (width, sum(sum(heights) + side + 60 for _, heights in layout)), "white")
    draw, y = ImageDraw.Draw(image), 0
    for (title, _, frames, *_), (columns, heights) in zip(rows, layout):
        draw.text((8, y + 8), title, "black", ImageFont.load_default(17))
        top = y + 36 + heights[0]
        for k, frame in enumerate(frames):
            picture = Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()).resize((side - 4, side - 4))
            image.paste(picture, (left + k * side + 2, top + 2))
        for name, color, column, at, step in (("before, F", "#0a7d28", columns[0], top - line, -line),
                                              ("after, V", "#c4161c", columns[1], top + side + 2, line)):
            draw.text((8, at), name, color, font)
            for k, words in enumerate(column):
                for j, word in enumerate(words if step > 0 else words[::-1]):
                    draw.text((left + k * side + side // 2, at + j * step), word, color, font, anchor="ma")
        y = top + side + heights[1] + 24
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Search your own videos: exact, from arrays on a disk

VIDEO_ENDINGS = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".flv", ".wmv", ".ts"}


def as_multivector(x, y):
    """The two-level score as one MaxSim, for any late-interaction engine: F, V of videos, or Q and Q again of queries.

    x (..., N, d), y (..., K, d), unit vectors -> (..., N + K, d + 2), unit vectors. Two coordinates are appended, (a, 0) to
    frame vectors and to one copy of the query, (0, a) to temporal vectors and to the other; all is divided by
    sqrt(1 + a^2). With a^2 = 2 a match of one kind is (2 + cos) / 3 >= 1/3 >= cos / 3, a match of two kinds: so a copy only
    ever matches its own kind, and MMS_FV = 3 / M MaxSim - 4. Leave out query vectors whose mask is False.
    """
    a = 2 ** 0.5
    x = torch.cat([x, x.new_tensor([a, 0]).expand(*x.shape[:-1], 2)], -1)   # (..., N, d + 2)
    y = torch.cat([y, y.new_tensor([0, a]).expand(*y.shape[:-1], 2)], -1)   # (..., K, d + 2)
    return torch.cat([x, y], -2) / 3 ** 0.5


def fingerprint(model):
    """A hash of a model's weights and of what else decides its vectors."""
    settings = {f.name: getattr(model.config, f.name) for f in fields(Config) if f.name != "pretrained"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode() + p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def video_files(root):
    """The path of every video file below root, by its ending, links followed, in order."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        if os.path.realpath(folder) in seen:                                # a link to where we have been
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        yield from (os.path.join(folder, file) for file in sorted(files) if os.path.splitext(file)[1].lower() in VIDEO_ENDINGS)


def read_clips(num_frames, size, paths):
    """[path] -> [(path, frames, seconds) or (path, None, what is wrong)]; a function of the file, for workers to run."""
    clips = []
    for path in paths:
        try:
            frames = sample_frames(path, num_frames, size)
            times, end, tick, _ = frame_times(path)
            clips.append((path, frames, (end - times[0]) * tick))
        except (av.FFmpegError, OSError, ValueError) as error:
            clips.append((path, None, str(error)))
    return clips


class VideoIndex:
    """F and V of many videos in a folder: index.json, and an array of fp16 (B, N + N + E, d), memory-mapped.

    videos: [[path below root, size, mtime_ns, seconds]], row i of the array is videos[i]. Grows at its end, and index.json
    is replaced after the array has it, so whatever kills a build leaves an index.
    """

    def __init__(self, folder, meta, device="cpu"):
        self.folder, self.meta, self.videos, self.model = Path(folder), meta, meta["videos"], None
        shape = len(self.videos), 2 * meta["num_frames"] + meta["visual_expansion"], meta["width"]
        self.vectors = torch.empty(shape, dtype=torch.float16)
        if len(self.videos):
            file, size = str(self.folder / meta["vectors"]), shape[0] * shape[1] * shape[2]
            self.vectors = torch.from_file(file, shared=False, size=size, dtype=torch.float16).view(shape)          # mapped, not read
        self.vectors = self.vectors.to(device)

    @classmethod
    def load(cls, folder, device="cpu"):
        """Open an index; on a GPU it is copied there. Raises ValueError for what is none, and for a truncated one."""
        try:
            meta = json.loads((Path(folder) / "index.json").read_text())
            need = 2 * len(meta["videos"]) * (2 * meta["num_frames"] + meta["visual_expansion"]) * meta["width"]
            have = (Path(folder) / meta["vectors"]).stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} is not a whole index: {getattr(error, 'strerror', None) or error}") from None
        if have < need:
            raise ValueError(f"{folder} is not a whole index: {meta['vectors']} has {have} of {need} bytes; "
                             f"remove the folder and index again")
        return cls(folder, meta, device)

    def write_meta(self):
        write_whole(self.folder / "index.json", json.dumps(self.meta).encode())

    @classmethod
    def build(cls, root, model, folder, name="", batch_size=16, workers=0):
        """Index every video below root -> index, [what was wrong with each unreadable file].

        An index that is there is brought up to date: new and changed files are encoded, deleted ones dropped. One of
        another model or another root is a ValueError. `name` is where search finds the model again.
        """
        root, folder = Path(os.path.abspath(root)), Path(folder)
        if not root.is_dir():
            raise ValueError(f"no folder {root}")
        found, broken = {}, []                                              # path below root: size, mtime
        for path in video_files(root):
            try:
                found[os.path.relpath(path, root)] = [(stat := os.stat(path)).st_size, stat.st_mtime_ns]
            except OSError as error:                                        # a link to nowhere
                broken.append(f"{path}: {error.strerror}")
        c, d = model.config, model.frame_positions.shape[1]
        if c.interaction != "mms":
            raise ValueError(f"an index holds token-wise vectors; a model of --interaction {c.interaction} has none")
        meta = dict(root=str(root), model=str(name), fingerprint=fingerprint(model), num_frames=c.num_frames,
                    visual_expansion=c.visual_expansion, width=d, vectors="vectors-0.f16", videos=[])
        if (folder / "index.json").exists():
            old = cls.load(folder)
            for key in ("root", "fingerprint"):
                if old.meta[key] != meta[key]:
                    raise ValueError(f"{folder} is an index of {old.meta['root']} by {old.meta['model'] or 'another model'}, "
                                     f"not of {root} by {name or 'this one'}: name a new folder")
            keep = [i for i, (path, *stat, _) in enumerate(old.videos) if found.get(path) == stat]
            meta.update(model=str(name) or old.meta["model"], vectors=old.meta["vectors"], videos=[old.videos[i] for i in keep])
            if len(keep) < len(old.videos):                                 # leave the dropped rows behind, in a new file
                meta["vectors"] = f"vectors-{int(re.findall(r'[0-9]+', old.meta['vectors'])[0]) + 1}.f16"
                with open(folder / meta["vectors"], "wb") as file:
                    for i in range(0, len(keep), 1024):
                        file.write(old.vectors[keep[i:i + 1024]].numpy().tobytes())
        folder.mkdir(parents=True, exist_ok=True)
        row = 2 * (2 * c.num_frames + c.visual_expansion) * d               # bytes a video
        (folder / meta["vectors"]).touch()
        os.truncate(folder / meta["vectors"], len(meta["videos"]) * row)    # an interrupted build may have been further
        cls(folder, meta).write_meta()
        for stale in folder.glob("vectors-*.f16"):
            if stale.name != meta["vectors"]:
                stale.unlink()

        known, due = {path for path, *_ in meta["videos"]}, time.monotonic() + 1
        todo = [path for path in found if path not in known]
        loader = DataLoader([str(root / path) for path in todo], batch_size, num_workers=workers,
                            collate_fn=partial(read_clips, c.num_frames, model.image_size))
        with open(folder / meta["vectors"], "ab") as file, tqdm(total=len(todo), desc="indexing", unit="video") as bar, torch.no_grad():
            for clips in loader:
                broken += [wrong for _, frames, wrong in clips if frames is None]
                good = [clip for clip in clips if clip[1] is not None]
                if good:
                    frames = torch.stack([frames for _, frames, _ in good]).to(model.mean.device)
                    with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
                        F, V = model.encode_video(frames)
                    file.write(torch.cat([F, V], 1).half().cpu().numpy().tobytes())
                    for path, _, length in good:
                        path = os.path.relpath(path, root)
                        meta["videos"].append([path, *found[path], round(length, 3)])
                if (start := time.monotonic()) > due:                       # a long list is written less often
                    file.flush()
                    os.fsync(file.fileno())
                    cls(folder, meta).write_meta()
                    due = time.monotonic() + 1 + 20 * (time.monotonic() - start)
                bar.update(len(clips))
        index = cls(folder, meta)
        index.write_meta()
        return index, broken

    @torch.no_grad()
    def scores(self, Q, mask):
        """Q (A, M, d), mask (A, M) -> MMS_F, MMS_V (A, B), exact for the vectors as they are stored."""
        N, parts = self.meta["num_frames"], []
        for x in self.vectors.split(1024):                                  # fp16 becomes float32 a chunk at a time
            x = x.float()
            parts.append((mean_max_sim(Q, x[:, :N], mask), mean_max_sim(Q, x[:, N:], mask)))
        return tuple(torch.cat(level, 1) for level in zip(*parts)) if parts else (Q.new_zeros(len(Q), 0),) * 2

    @torch.no_grad()
    def search(self, model, queries, k=10):
        """[A str] -> for each query its k best videos, dicts of path, score, F, V, and start, end of its best frame in seconds.

        The best frame is the one nearest to the query's tokens in the mean, over both levels. Raises ValueError for another
        model than the index's, and where k is more than it holds.
        """
        if model is not self.model and fingerprint(model) != self.meta["fingerprint"]:
            raise ValueError(f"{self.folder} was made by another model ({self.meta['model'] or 'unnamed'})")
        self.model = model                                                  # reading all weights once is enough
        if not 1 <= k <= len(self.videos):
            raise ValueError(f"k must be 1 to {len(self.videos)}, the videos of {self.folder}, not {k}")
        ids, mask = (x.to(self.vectors.device) for x in model.tokenize(queries))
        Q = model.encode_query(ids.to(model.mean.device), mask.to(model.mean.device)).to(self.vectors.device)
        F, V = self.scores(Q, mask)
        best, N = (F + V).topk(k), self.meta["num_frames"]
        hits = []
        for q, rows, F, V in zip(Q, best.indices, F, V):
            near = self.vectors[rows].float() @ q.sum(0)                    # (k, N + N + E), masked tokens are 0
            n = (near[:, :N] + near[:, N:2 * N]).argmax(1).tolist()         # (k,)
            hits.append([])
            for i, f in zip(rows.tolist(), n):
                path, _, _, length = self.videos[i]
                hits[-1].append(dict(path=os.path.join(self.meta["root"], path), score=(F[i] + V[i]).item(), F=F[i].item(), V=V[i].item(),
                                     start=round(f / N * length, 2), end=round((f + 1) / N * length, 2), frame=f))
        return hits

    def to_lancedb(self, uri, table="videos"):
        """Write a LanceDB table (a folder or object storage) of path, seconds and vector, as_multivector's form -> table."""
        import lancedb                                                      # only whoever asks for it needs it
        import pyarrow
        N, vector = self.meta["num_frames"], pyarrow.list_(pyarrow.list_(pyarrow.float32(), self.meta["width"] + 2))
        schema = pyarrow.schema([("path", pyarrow.string()), ("seconds", pyarrow.float64()), ("vector", vector)])

        def batches():
            for i in range(0, len(self.videos), 256):
                x, videos = self.vectors[i:i + 256].float(), self.videos[i:i + 256]
                rows = as_multivector(x[:, :N], x[:, N:]).cpu().numpy()
                yield pyarrow.RecordBatch.from_pydict({"path": [v[0] for v in videos], "seconds": [v[3] for v in videos],
                                                       "vector": [list(row) for row in rows]}, schema)
        return lancedb.connect(uri).create_table(table, batches(), schema=schema)


def draw_hits(query, hits, num_frames, side=96):
    """A contact sheet -> PIL image: for each hit a strip of at most 12 frames, the query's best one framed."""
    step = -(-num_frames // 12)
    image = Image.new("RGB", (max(500, -(-num_frames // step) * side + 16), 40 + len(hits) * (side + 34)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.text((8, 8), query, "black", ImageFont.load_default(18))
    for rank, hit in enumerate(hits):
        y, frames = 40 + rank * (side + 34), sample_frames(hit["path"], num_frames, side - 8)
        title = f"{rank + 1}   {hit['score']:.3f}   {Path(hit['path']).name}   {hit['start']:.1f} to {hit['end']:.1f} s"
        draw.text((8, y), title, "black", font)
        for column, n in enumerate(range(hit["frame"] % step, num_frames, step)):
            if n == hit["frame"]:
                draw.rectangle((8 + column * side, y + 20, 8 + (column + 1) * side - 1, y + 20 + side - 1), "#c4161c")
            image.paste(Image.fromarray(frames[n].permute(1, 2, 0).numpy()), (12 + column * side, y + 24))
    return image


def open_model(name, device):
    """A run's folder, or an open_clip name for a model that was never trained on video -> model on the device."""
    torch.manual_seed(0)                                                    # its new parts are the same each time
    model = VideoColBERT.load(name) if Path(name).is_dir() else VideoColBERT(Config(backbone=name))
    return model.to(device).eval()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Index videos, search them, see why one was found.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("index", help="index every video below a folder, or bring an index up to date")
    one.add_argument("folder")
    one.add_argument("--out", required=True, help="the index's folder")
    two = commands.add_parser("search", help="find videos by a sentence")
    two.add_argument("index")
    two.add_argument("query")
    two.add_argument("-k", type=int, default=5, help="number of hits [5]")
    two.add_argument("--sheet", help="draw the hits into this picture")
    two.add_argument("--json", action="store_true", help="print the hits as JSON")
    three = commands.add_parser("explain", help="draw which frame each word picks in a video, before and after the temporal transformer")
    three.add_argument("query")
    three.add_argument("video")
    three.add_argument("--out", default="explain.png", help="the picture [explain.png]")
    for command in (one, two, three):
        command.add_argument("--model", required=command is not two, help="a run's folder, or an open_clip name for zero-shot")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args(argv)
    if a.command == "index":
        name = os.path.abspath(a.model) if Path(a.model).is_dir() else a.model
        index, broken = VideoIndex.build(a.folder, open_model(a.model, a.device), a.out, name, workers=os.cpu_count())
        print("\n".join([*(f"skipped: {line}" for line in broken), f"{len(index.videos)} videos in {a.out}"]))
    elif a.command == "search":
        index = VideoIndex.load(a.index, a.device)
        model = open_model(a.model or index.meta["model"], a.device)
        hits, = index.search(model, [a.query], a.k)
        if a.sheet:
            draw_hits(a.query, hits, index.meta["num_frames"]).save(a.sheet)
        lines = [f"{rank}  {h['score']:.3f} (F {h['F']:.3f}, V {h['V']:.3f})  {h['path']}  {h['start']:.1f} to {h['end']:.1f} s"
                 for rank, h in enumerate(hits, 1)]
        print(json.dumps(hits) if a.json else "\n".join(lines))
    else:
        model = open_model(a.model, a.device)
        frames = sample_frames(a.video, model.config.num_frames, model.image_size)
        words, before, after = (x if isinstance(x, list) else x.cpu() for x in interactions(model, a.query, frames))
        if not words:
            raise ValueError(f"no words in {a.query!r}")
        for word, b, v in zip(words, before, after):
            print(f"{word:20} before: frame {b.argmax() + 1}, {b.max():.3f}   after: frame {v.argmax() + 1}, {v.max():.3f}")
        draw_interactions([(f"{a.query}   ({Path(a.video).name})", words, frames, before, after)]).save(a.out)
        print(a.out)


def run_main(main, name):
    """Bad input and a full disk are one line and code 2, being stopped is 130."""
    def stopped(number, frame):
        raise KeyboardInterrupt("stopped")
    signal.signal(signal.SIGTERM, stopped)
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"{name}: {error or 'stopped'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_main(main, "video_colbert.py")
