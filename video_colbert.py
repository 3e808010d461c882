"""Video-ColBERT (CVPR 2025): text-to-video retrieval by contextualised late interaction.

    model = VideoColBERT(Config())                           # CLIP ViT-B/32, the paper's settings
    frames = torch.stack([sample_frames(path, 12, 224) for path in paths])
    F, V = model.encode_video(frames)                        # before and after temporal attention
    ids, mask = model.tokenize(["a man feeds a dog"])
    Q = model.encode_query(ids, mask)
    scores = mms_fv(*model.similarities(Q, mask, F, V))      # (queries, videos), equation 5

Shapes: A queries, B videos, M query tokens, N frames, E visual expansion tokens, d the width of the
joint embedding. Section, equation and table numbers are the paper's.
"""
import bisect
import contextlib
import copy
import difflib
import itertools
import json
import os
import threading
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from textwrap import fill, shorten

import av
import numpy as np
import open_clip
import safetensors.torch
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

class InputError(ValueError):
    """The user typed or supplied something wrong. Programs print the message as one line."""

# ---- Settings: the paper's for MSR-VTT. A field's comment is its help text in train.py. ---------
@dataclass
class Config:
    backbone: str = "ViT-B-32-quickgelu"  # open_clip model (section 5.2), or "tiny" for a CPU
    # Weights: an open_clip tag, a file, or none. auto is OpenAI's CLIP or WebLI's SigLIP (section
    # 5.2). With a file, frames are normalised with the backbone's default mean and std.
    pretrained: str | None = "auto"
    num_frames: int = 12                  # frames per video (section 5.2, Table 7)
    num_tokens: int = 32                  # tokens per query (section 5.2); SigLIP always uses 64
    pad_token: int = 0                    # pads CLIP queries to num_tokens, 0 is "!" (Table 12)
    query_augmentation: bool = True       # pad tokens take part in MeanMaxSim (4.2, Table 5)
    temporal_layers: int = 4              # depth of the temporal transformer (5.2, Table 8)
    visual_expansion: int = 2             # E, learned tokens beside the frames (sections 4.2, 5.2)
    interaction: str = "mms"              # mms (MeanMaxSim) or mp (mean pooling, equation 1)
    loss: str = "sigmoid"                 # sigmoid or infonce (section 4.3, Table 4)
    loss_form: str = "dual"               # dual (equation 7) or combined (section 6, Table 4)
    lambda_frame: float = 1.0             # weight of the loss on MMS_F (equation 7, section 5.2)
    lambda_video: float = 1.0             # weight of the loss on MMS_V (equation 7, section 5.2)
    logit_scale: float = 4.77             # log t of equation 6, SigLIP's value (section 6)
    logit_bias: float = -12.93            # b of equation 6, SigLIP's value (section 6)
    learn_scale: bool = False             # train log t and b; the paper fixes them (section 6)
    freeze: bool = True                   # freeze positions, patch and token embeddings (5.2)

# ---- Interaction (section 4.1) -------------------------------------------------------------------
def mean_max_sim(Q, V, mask=None):
    """Equations 3 and 4: the mean over query tokens of each token's best similarity to a frame.

    Q (A, M, d), V (B, N, d) and optionally a bool mask (A, M) of the tokens that count -> (A, B),
    at least float32. The vectors are not normalised here: unit vectors give a mean of cosines."""
    A, M, B, N = *Q.shape[:2], *V.shape[:2]
    dtype = torch.promote_types(Q.dtype, torch.float32)      # bf16 is too coarse for a scale of 118
    frames = V.to(dtype).transpose(0, 1).flatten(0, 1)         # (N B, d): frames first, a fast amax
    weight = torch.ones_like(Q[..., 0]) if mask is None else mask  # (A, M)
    weight = weight.to(dtype) / weight.sum(1, keepdim=True)       # 1/M for the tokens that count
    def mms(q, w):                                                # (a, M, d), (a, M)
        sim = q.flatten(0, 1) @ frames.T                          # (a M, N B)
        best = sim.view(len(q) * M, N, B).amax(1)                 # (a M, B), max over frames
        return (w[:, None] @ best.view(len(q), M, B)).squeeze(1)  # (a, B), mean over tokens

    # Without gradients `sim` is cut to pieces of 32 MB. With gradients autograd keeps all of it.
    a = A if torch.is_grad_enabled() else 2 ** 23 // max(1, M * N * B)
    with torch.autocast(Q.device.type, enabled=False):
        pieces = zip(Q.to(dtype).split(max(1, a)), weight.split(max(1, a)))
        return torch.cat([mms(q, w) for q, w in pieces])

def mms_fv(mms_f, mms_v):
    """Equation 5: the score of a video is the sum of its two levels. Both have the same shape."""
    return mms_f + mms_v

# ---- Losses (section 4.3) ------------------------------------------------------------------------
# `positives` is bool (A, B), by default the diagonal. `logit_scale` is log t, as SigLIP stores it.
def sigmoid_loss(sim, positives=None, logit_scale=4.77, logit_bias=-12.93):
    """Equation 6 on similarities (A, B) -> scalar, summed over videos and averaged over queries.
    The bias is added: `t x + b`, as in SigLIP's released code. The paper prints `-t x + b`."""
    positives = torch.eye(*sim.shape, device=sim.device) > 0 if positives is None else positives
    z = torch.where(positives, 1.0, -1.0)                         # (A, B)
    t = torch.as_tensor(logit_scale, dtype=sim.dtype, device=sim.device).exp()  # exp(4.77) = 118
    return -logsigmoid(z * (t * sim + logit_bias)).sum() / len(sim)  # over A queries, not all pairs

def info_nce_loss(sim, positives=None, logit_scale=4.6052, logit_bias=0.0):
    """The baseline of section 4.3 on similarities (A, B) -> scalar, averaged over both directions.
    Several positives share the target of their row or column. `logit_bias` has no effect."""
    positives = torch.eye(*sim.shape, device=sim.device) > 0 if positives is None else positives
    logits = torch.as_tensor(logit_scale, dtype=sim.dtype, device=sim.device).exp() * sim
    target = positives.to(sim.dtype)                              # (A, B)
    text_to_video = cross_entropy(logits, target / target.sum(1, keepdim=True))
    video_to_text = cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (text_to_video + video_to_text) / 2

LOSSES = {"sigmoid": sigmoid_loss, "infonce": info_nce_loss}      # --loss chooses one

def dual_loss(sim_F, sim_V, positives=None, loss=sigmoid_loss, lambda_frame=1.0, lambda_video=1.0,
              **scale):
    """Equation 7: one loss on MMS_F and one on MMS_V, both (A, B), so each must rank well."""
    loss_F, loss_V = loss(sim_F, positives, **scale), loss(sim_V, positives, **scale)
    return lambda_frame * loss_F + lambda_video * loss_V

# ---- Model (sections 4.1, 4.2, 5.2) --------------------------------------------------------------
TINY = dict(embed_dim=64,                                         # for synthetic clips and tests
            vision_cfg=dict(image_size=64, patch_size=16, width=64, layers=2, head_width=32),
            text_cfg=dict(width=64, heads=2, layers=2))

FROZEN = ("text.positional_embedding", "text.token_embedding", "visual.positional_embedding",
          "visual.conv1", "visual.trunk.pos_embed", "visual.trunk.patch_embed")  # section 5.2

def load_backbone(name, pretrained):
    """An open_clip model by name -> (model, mean (3,), std (3,)), the last two of its weights.
    Raises InputError for an unknown name, for another kind of model and for missing weights."""
    openai = dict(mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
    if name == "tiny":
        clip = open_clip.CustomTextCLIP(**TINY)
        clip.visual.positional_embedding.data *= 4                # else the patches drown them
        return clip, *openai.values()
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, ["tiny", *open_clip.list_models()], n=5, cutoff=0.4)
        raise InputError(f"unknown backbone {name!r}; similar names: {', '.join(near)}")
    config = open_clip.get_model_config(name)
    config.pop("custom_text", None)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if isinstance(vision.get("layers"), list) or "multimodal_cfg" in config \
            or "hf_model_name" in text or text.get("width", 512) != config["embed_dim"]:
        raise InputError(f"backbone {name!r} is not supported: it is not built like CLIP")
    clip = open_clip.CustomTextCLIP(**config)
    tags = open_clip.list_pretrained_tags_by_model(name)
    default = next((tag for tag in ("openai", "webli") if tag in tags), "")
    tag = default if pretrained == "auto" else pretrained
    source = {**openai, **open_clip.get_pretrained_cfg(name, tag if tag in tags else default)}
    if pretrained not in (None, "none"):
        if tag in tags and source.get("quick_gelu", False) != config.get("quick_gelu", False):
            raise InputError(f"weights {tag!r} and backbone {name!r} differ in QuickGELU, which "
                             "costs accuracy; use the name with -quickgelu")
        try:
            file = open_clip.download_pretrained(source) if tag in tags else tag
            open_clip.load_checkpoint(clip, file)
        except Exception as error:     # the network, the hub, the disk, or a file of something else
            raise InputError(f"cannot load {tag!r} into {name}: {shorten(str(error), 200)}. Give a "
                             f"file (from {source.get('hf_hub') or source.get('url')}), none, or a "
                             f"tag: {', '.join(tags)}") from None
    return clip, source["mean"], source["std"]

class TemporalTransformer(nn.Module):
    """Contextualises the frames of a video (sections 4.1, 4.2): f (B, N, d) -> (B, N + E, d).
    The layers start as the text encoder's first ones, weights included (the paper is silent on the
    weights; CLIP4Clip, X-CLIP and DRL do this). If there are more, they repeat from its first."""
    def __init__(self, config, text):
        super().__init__()
        blocks, d = text.transformer.resblocks, text.output_dim
        layers = [copy.deepcopy(blocks[i % len(blocks)]) for i in range(config.temporal_layers)]
        self.blocks = nn.ModuleList(layers)
        size = 0.9 if config.backbone == "tiny" else 0.3     # near the features' size; paper silent
        self.frame_positions = nn.Parameter(size * torch.randn(config.num_frames, d))
        self.visual_expansion = nn.Parameter(0.02 * torch.randn(config.visual_expansion, d))

    def forward(self, f):
        e = self.visual_expansion.expand(len(f), -1, -1)          # (B, E, d)
        x = torch.cat([f + self.frame_positions[:f.shape[1]], e], dim=1)  # (B, N + E, d)
        for block in self.blocks:                            # no mask: every frame sees every frame
            x = block(x)
        return x + torch.cat([f, e], dim=1)             # a residual, as in CLIP4Clip (paper silent)

class VideoColBERT(nn.Module):
    """The query encoder, frame encoder and temporal transformer of Figure 2, and the loss. Q, F and
    V are float32 unit vectors, also under autocast. `image_size` is the side of a frame in pixels,
    `width` is d. Raises InputError for settings that no model can have."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        for name, known in (("interaction", ("mms", "mp")), ("loss", LOSSES),
                            ("loss_form", ("dual", "combined"))):
            if (value := getattr(config, name)) not in known:
                raise InputError(f"{name} must be {' or '.join(known)}, not {value}")
        if min(config.num_frames, config.temporal_layers) < 1 or config.visual_expansion < 0:
            raise InputError("num_frames and temporal_layers must be 1 or more, visual_expansion 0")
        self.clip, mean, std = load_backbone(config.backbone, config.pretrained)
        for name, p in self.clip.named_parameters():
            p.requires_grad = not (config.freeze and name.startswith(FROZEN))
        self.clip.logit_scale = self.clip.logit_bias = None       # ours are below
        text, self.image_size = self.clip.text, self.clip.visual.image_size[0]
        self.width, longest = text.output_dim, text.context_length
        self.is_siglip = text.pool_type == "last"      # no causal mask, always padded to its length
        self.num_tokens = longest if self.is_siglip else config.num_tokens
        if not 3 <= self.num_tokens <= longest:
            raise InputError(f"num_tokens must be 3 to {longest}, not {self.num_tokens}")
        if not 0 <= config.pad_token < text.token_embedding.num_embeddings:
            raise InputError(f"pad_token cannot be {config.pad_token}")
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))  # saved with the model
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))
        self.temporal = TemporalTransformer(config, text)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale))
        self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias))
        self.logit_scale.requires_grad = self.logit_bias.requires_grad = config.learn_scale

    @property
    def device(self):
        return self.mean.device

    @cached_property
    def tokenizer(self):
        name = "ViT-B-32" if self.config.backbone == "tiny" else self.config.backbone
        try:
            return open_clip.get_tokenizer(name)
        except Exception as error:                        # SigLIP's comes from the hub on first use
            hub_name = open_clip.get_model_config(name)["text_cfg"].get("hf_tokenizer_name")
            raise InputError(f"no tokenizer {hub_name}: fetch it once with a network "
                             f"({shorten(str(error), 200)})") from None

    def real_tokens(self, ids):
        """ids (A, M) -> bool (A, M): True for start, words and end, False for pads."""
        tokenizer = self.tokenizer
        end = tokenizer.tokenizer.eos_token_id if self.is_siglip else tokenizer.eot_token_id
        position = torch.arange(ids.shape[1], device=ids.device)  # (M,)
        return position <= (ids == end).int().argmax(1, keepdim=True)

    def tokenize(self, texts):
        """A strings -> ids int64 (A, M), mask bool (A, M) of the tokens that count: with query
        augmentation all, with mean pooling the one that CLIP or SigLIP pools. A caption that is too
        long is cut and keeps its end token.
        """
        ids = self.tokenizer(texts, context_length=self.num_tokens)  # (A, M)
        real = self.real_tokens(ids)
        if not self.is_siglip:
            ids = ids.where(real, self.config.pad_token)
        if self.config.interaction == "mp":
            last = torch.full((len(ids),), ids.shape[1]) if self.is_siglip else real.sum(1)
            return ids, torch.arange(ids.shape[1]) == last[:, None] - 1
        return ids, real | self.config.query_augmentation

    def encode_query(self, ids, mask):
        """ids (A, M), mask (A, M) from tokenize -> Q float32 (A, M, d), unit vectors, 0 if masked.
        open_clip projects one token; here all are. CLIP's causal mask hides pads from the words.
        """
        text, M = self.clip.text, ids.shape[1]
        causal = None if text.attn_mask is None else text.attn_mask[:M, :M]
        x = text.token_embedding(ids) + text.positional_embedding[:M]  # (A, M, d)
        x = text.ln_final(text.transformer(x, attn_mask=causal))
        project = text.text_projection
        x = project(x) if isinstance(project, nn.Linear) else x @ project
        return normalize(x.float(), dim=-1) * mask[..., None]     # (A, M, d)

    def encode_video(self, frames):
        """uint8 RGB frames (B, N, 3, image_size, image_size), N at most num_frames -> F (B, N, d),
        V (B, N + E, d). Raises ValueError for frames of another shape or type."""
        (B, N, *pixels), most, size = frames.shape, self.config.num_frames, self.image_size
        if frames.dtype != torch.uint8 or not 1 <= N <= most or pixels != [3, size, size]:
            raise ValueError(f"frames must be uint8 (B, 1 to {most}, 3, {size}, {size}), not "
                             f"{frames.dtype} {tuple(frames.shape)}")
        images = frames.flatten(0, 1).float().sub_(self.mean).div_(self.std)  # (B N, 3, H, W)
        f = self.clip.visual(images).view(B, N, -1)      # [CLS] for CLIP, attention pool for SigLIP
        return normalize(f.float(), dim=-1), normalize(self.temporal(f).float(), dim=-1)

    def similarities(self, Q, mask, F, V):
        """Q (A, M, d), mask (A, M), F (B, N, d), V (B, N + E, d) -> MMS_F (A, B), MMS_V (A, B).
        For mean pooling (equation 1) the mask keeps one token and F and V become one vector each.
        """
        if self.config.interaction == "mp":
            V = normalize(V[:, :F.shape[1]].mean(1, keepdim=True), dim=-1)  # without expansion
            F = normalize(F.mean(1, keepdim=True), dim=-1)        # (B, 1, d)
        return mean_max_sim(Q, F, mask), mean_max_sim(Q, V, mask)

    def loss(self, Q, mask, F, V, positives=None):
        """Arguments as in `similarities`, positives (A, B) -> loss, MMS_F (A, B), MMS_V (A, B)."""
        c, loss = self.config, LOSSES[self.config.loss]
        scale = dict(logit_scale=self.logit_scale, logit_bias=self.logit_bias)
        sim_F, sim_V = self.similarities(Q, mask, F, V)
        if c.loss_form == "combined":                             # one loss on MMS_FV, Table 4
            return loss(mms_fv(sim_F, sim_V), positives, **scale), sim_F, sim_V
        total = dual_loss(sim_F, sim_V, positives, loss, c.lambda_frame, c.lambda_video, **scale)
        return total, sim_F, sim_V

    def forward(self, ids, mask, frames, positives=None):
        """A batch's training loss, MMS_F and MMS_V; arguments as above."""
        return self.loss(self.encode_query(ids, mask), mask, *self.encode_video(frames), positives)

    def save(self, folder):
        """Write config.json and model.safetensors into `folder`, each completely or not at all."""
        weights = {name: p.detach().cpu().contiguous() for name, p in self.state_dict().items()}
        config = {f.name: getattr(self.config, f.name) for f in fields(Config)}
        write_file(Path(folder, "model.safetensors"), safetensors.torch.save(weights))
        write_file(Path(folder, "config.json"), json.dumps(config, indent=2).encode())

    @classmethod
    def load(cls, folder):
        """The model that `save` wrote, in eval mode. Raises InputError if the folder holds none."""
        config = read_settings(Config, Path(folder, "config.json"))
        model = cls(replace(config, pretrained=None))             # its weights are in the folder
        try:
            model.load_state_dict(safetensors.torch.load_file(Path(folder, "model.safetensors")))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise InputError(f"{folder} holds no model: {shorten(str(error), 200)}") from None
        model.config = config
        return model.eval()

def read_settings(cls, path):
    """A settings dataclass from JSON. Missing fields get their default; InputError for others."""
    try:
        return cls(**json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} does not hold settings: {shorten(str(error), 200)}") from None

def write_file(path, *parts):
    """Write bytes to a file, completely or not at all, and make its folder. Raises InputError."""
    temporary = Path(f"{path}.{threading.get_native_id()}.part")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: {error.strerror}") from None

# ---- Frames of a video file (section 5.2) --------------------------------------------------------
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv")  # others have rough times

def frame_times(path):
    """-> times of the frames in ticks, sorted; the end of the last; seconds per tick; (pts, dts) of
    the keyframes to seek to, or None if a file has no times: then ticks count its frames."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise InputError(f"{path}: no video stream of a known codec")
        can_seek = container.format.name in SEEKABLE
        packets = [(p.pts, p.duration or 0, p.dts or p.pts, p.is_keyframe and can_seek)
                   for p in container.demux(stream) if p.size and not p.is_discard]
        rate = stream.average_rate or 25
        if packets and all(pts is not None for pts, *_ in packets):
            ticks = sorted(pts for pts, *_ in packets)
            length = max(packets)[1] or (ticks[-1] - ticks[0]) // len(ticks) or 1
            keys = sorted((pts, dts) for pts, _, dts, is_keyframe in packets if is_keyframe)
            return ticks, ticks[-1] + length, float(stream.time_base), keys
    with av.open(str(path), metadata_errors="ignore") as container:
        count = sum(1 for _ in container.decode(container.streams.best("video")))
    return list(range(count)), count, float(1 / rate), None

def upright_pixels(frame, size):
    """A decoded frame as uint8 (size, size, 3), turned and mirrored as its display matrix says."""
    pixels = frame.to_ndarray(width=size, height=size, format="rgb24", interpolation="BICUBIC")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]           # x' = a x + c y, y' = b x + d y
    if abs(b) > abs(a):                                           # x and y change places
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]

def sample_times(path, times, num_frames, start=0.0, end=None):
    """The times in ticks, (num_frames,), of the frames that sample_frames takes."""
    ticks, last, tick, _ = times
    zero = ticks[0] if ticks else last
    first, last = zero + start / tick, last if end is None else min(last, zero + end / tick)
    if not first < last:
        raise InputError(f"{path}: no frames between start {start} and end {end}, in seconds")
    middles = first + (np.arange(num_frames) + 0.5) / num_frames * (last - first)
    return np.array(ticks)[np.searchsorted(ticks, middles, side="right") - 1]

def frames_from(container, stream, pts, dts):
    """Yield (time, frame) from a keyframe on. Whatever comes before it is dropped."""
    with contextlib.suppress(av.FFmpegError):
        container.seek(dts, stream=stream)                        # or to some packet before it
    for packet in itertools.dropwhile(lambda packet: packet.pts != pts, container.demux(stream)):
        for frame in packet.decode():
            if frame.pts is not None:
                yield frame.pts, frame

def frames_at(path, wanted, keys, size):
    """Yield the pixels on screen at each of the sorted ticks `wanted`, seeking to one of the `keys`
    where that skips frames. If seeking misses it, the rest is decoded from the beginning."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        timed = enumerate(container.decode(stream)) if keys is None else (
            (frame.pts, frame) for frame in container.decode(stream) if frame.pts is not None)
        shown, now, coming = None, -np.inf, None   # the frame on screen; time and frame to come
        for i, tick in enumerate(wanted):
            key = keys[max(0, bisect.bisect(keys, (tick, np.inf)) - 1)] if keys else None
            if key and key[0] > max(now, keys[0][0]):
                timed = frames_from(container, stream, *key)
                now, coming = next(timed, (None, None))
                if now != key[0]:
                    yield from frames_at(path, wanted[i:], [], size)
                    return
            while now <= tick:
                shown = coming
                now, coming = next(timed, (np.inf, None))
            if not (shown or coming):
                raise InputError(f"{path}: no frame can be decoded")
            yield upright_pixels(shown or coming, size)

def sample_frames(path, num_frames, size, start=0.0, end=None):
    """TSN-style sampling of a video, or of its part from `start` to `end` in seconds: the frame on
    screen in the middle (the paper is silent on where) of each of `num_frames` equal segments
    -> uint8 (num_frames, 3, size, size), RGB, resized without keeping the aspect ratio. Clips with
    fewer frames repeat them. Raises InputError, which names the file, if no frame can be had."""
    try:
        times = frame_times(path)
        wanted = sample_times(path, times, num_frames, start, end)
        frames = np.stack(list(frames_at(path, wanted, times[3], size)))
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()  # (N, 3, size, size)

# ---- Metrics (section 5.3) -----------------------------------------------------------------------
def ranks(sim, target):
    """sim (A, B), each query's relevant video (A,) -> its rank int (A,), 1 is best. A tie counts
    against the model: the rank is the number of videos that score at least as high."""
    return (sim >= sim.gather(1, target[:, None])).sum(1)

def retrieval_metrics(sim, target):
    """sim (A, B), target int (A,) as in `ranks` -> R@1, R@5, R@10 in percent, nDCG@10 from 0 to 1,
    median and mean rank MdR and MnR, a dict. Raises ValueError for NaN and for no queries."""
    sim, target = torch.as_tensor(sim), torch.as_tensor(target, dtype=torch.int64)
    if len(sim) == 0 or sim.isnan().any():
        raise ValueError("there are no queries to evaluate, or the similarities hold NaN")
    rank = ranks(sim, target).double()                            # (A,)
    recall = {f"R@{k}": 100 * (rank <= k).double().mean().item() for k in (1, 5, 10)}
    gain = torch.where(rank <= 10, 1 / torch.log2(1 + rank), 0)
    return {**recall, "nDCG@10": gain.mean().item(),
            "MdR": rank.quantile(0.5).item(), "MnR": rank.mean().item()}

def video_to_text(sim, target):
    """sim (A, B), target (A,) -> sim (G, G), target (G,): each of the G videos that have captions
    ranks the G groups of captions. A group scores as its best caption, as usual since CLIP4Clip."""
    videos, group = torch.as_tensor(target).unique(return_inverse=True)  # (G,), (A,)
    best = sim.new_full((len(videos), sim.shape[1]), -torch.inf)  # (G, B)
    best = best.scatter_reduce(0, group[:, None].expand_as(sim), sim, "amax")
    return best.T[videos], torch.arange(len(videos))

def reciprocal_rank_fusion(sim_F, sim_V, k=60):
    """Similarities (A, B) twice -> the sum of 1 / (k + rank) (section 6); ties count as misses."""
    def rank(sim):                                                # 1 is best, ties rank last
        return sim.shape[1] - torch.searchsorted(sim.sort(1).values, sim.contiguous())
    return 1 / (k + rank(sim_F).double()) + 1 / (k + rank(sim_V).double())

def result_rows(sim_F, sim_V, target, interaction="mms"):
    """Metrics of Table 3's scores, text to video and video to text -> a list of dictionaries."""
    to_video, rows, name = (sim_F, sim_V, mms_fv(sim_F, sim_V)), [], interaction.upper()
    to_text, targets = zip(*(video_to_text(sim, target) for sim in to_video))
    for direction, sims, goal in (("text to video", to_video, target),
                                  ("video to text", to_text, targets[0])):
        scores = dict(zip((f"{name}_F", f"{name}_V", f"{name}_FV"), sims))
        scores["RRF"] = reciprocal_rank_fusion(sims[0], sims[1])
        row = dict(direction=direction, queries=len(goal))
        rows += [{**row, "score": s, **retrieval_metrics(scores[s], goal)} for s in scores]
    return rows

def results_table(result):
    """{"evaluation": result_rows, "gallery": videos ranked, "missing": videos left out} as text."""
    missing, rows = result["missing"], result["evaluation"]
    note = f", {missing} test clips missing: not comparable" if missing else ""
    lines = [f"gallery of {result['gallery']} clips{note}"]
    for first, *rest in (rows[0].keys(), *(row.values() for row in rows)):
        cells = [f"{x:#10.4g}" if isinstance(x, float) else f"{x:>10}" for x in rest]
        lines.append(f"{first:13}" + "".join(cells))
    return "\n".join(lines)

# ---- Figure 4: which frame does each word pick, before and after the temporal transformer? ------
@torch.no_grad()
def interactions(model, query, frames):
    """query str, uint8 frames (N, 3, S, S) -> its W words, similarities (W, N) before and after.
    Subword tokens are averaged. As in the paper's figure, expansion tokens take no part."""
    F, V = model.encode_video(frames[None].to(model.device))      # (1, N, d), (1, N + E, d)
    special = int(model.real_tokens(model.tokenize([""])[0]).sum())  # start and end, or only end
    ids, _ = model.tokenize([query])
    real = model.real_tokens(ids)
    Q = model.encode_query(ids.to(model.device), real.to(model.device))[0]  # (M, d)
    Q = Q[special - 1:int(real.sum()) - 1]                        # (T, d), tokens of the words
    kept, vectors, first = [], [], 0
    for word in query.split():
        length = int(model.real_tokens(model.tokenize([word])[0]).sum()) - special
        if length and first < len(Q):                             # a long query is cut
            kept.append(word)
            vectors.append(Q[first:first + length].mean(0))
        first += length
    W = torch.stack(vectors) if vectors else Q[:0]                # (W, d)
    return kept, W @ F[0].T, W @ V[0, :len(frames)].T

def draw_interactions(rows, side=96):
    """rows of (title, words, frames (N, 3, S, S), before (W, N), after (W, N)) -> PIL image. A row
    shows at most 12 frames, those that most words pick: above a frame in green the words that
    pick it before the temporal transformer, below it in red those that pick it after."""
    font, strips = ImageFont.load_default(12), []
    width = 8 + side * max(5, *(min(12, len(frames)) for _, _, frames, _, _ in rows))
    for title, words, frames, before, after in rows:
        first, then = before.argmax(1).tolist(), after.argmax(1).tolist()
        shown = sorted(range(len(frames)), key=lambda n: -(first + then).count(n))[:12]
        label_height = 10 + 16 * max(picks.count(n) for picks in (first, then) for n in shown)
        top = 34 + 21 * fill(title, width // 10).count("\n") + label_height
        strip = Image.new("RGB", (width, top + side + label_height), "white")
        draw = ImageDraw.Draw(strip)
        draw.text((8, 8), fill(title, width // 10), "black", ImageFont.load_default(17))
        for x, n in zip(range(8, width, side), sorted(shown)):
            picture = Image.fromarray(frames[n].permute(1, 2, 0).cpu().numpy())
            strip.paste(picture.resize((side - 4, side - 4)), (x, top + 2))
            for sim, y, anchor, color in ((before, top, "md", "#0a7d28"),
                                          (after, top + side, "ma", "#c4161c")):
                best = zip(words, *sim.max(1))
                lines = [f"{word[:10]} {score:.2f}" for word, score, m in best if m == n]
                draw.text((x + side // 2 - 2, y), "\n".join(lines), color, font, anchor)
        strips.append(np.asarray(strip))
    return Image.fromarray(np.concatenate(strips))
