"""Video-ColBERT (CVPR 2025): text-to-video retrieval by contextualized late interaction.

    model = VideoColBERT(Config())  # CLIP ViT-B/32, the paper's settings
    frames = torch.stack([sample_frames(path, 12, 224) for path in paths])
    F, V = model.encode_video(frames)  # before and after temporal attention
    ids, mask = model.tokenize(["a man feeds a dog"])
    Q = model.encode_query(ids)
    mms_f, mms_v = model.similarities(Q, mask, F, V)
    scores = mms_fv(mms_f, mms_v)  # (queries, videos), equation 5

Shapes: A queries, B videos, M query tokens, N frames, E visual expansion tokens, d the
width of the joint embedding. Section, equation and table numbers are the paper's.
"""
import contextlib
import copy
import difflib
import json
import os
import zipfile
from collections import deque
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

# The text of this file as it was loaded. It is read before the slow imports, during which
# the file may be edited. Whoever stores frames can tell by it how they were taken.
SOURCE = Path(__file__).read_text(encoding="utf-8")

import av
import numpy as np
import open_clip
import safetensors.torch
import torch
from av.video.reformatter import VideoReformatter
from safetensors import SafetensorError
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize, one_hot

class InputError(ValueError):
    """The user typed or supplied something wrong. Programs print it as one line."""

class VideoError(InputError):
    """A video cannot be read."""

# ---- Settings
# The defaults are the paper's for MSR-VTT. train.py shows the comments as help texts.
@dataclass
class Config:
    # A CLIP or SigLIP model of open_clip (section 5.2), or "tiny" for a CPU.
    backbone: str = "ViT-B-32-quickgelu"
    # An open_clip tag, a file, or none; auto is OpenAI's CLIP or WebLI's SigLIP.
    pretrained: str | None = "auto"
    num_frames: int = 12  # frames per video (section 5.2, Table 7)
    num_tokens: int = 32  # tokens per query (5.2); SigLIP uses all it has, 64
    pad_token: int = 0  # pads CLIP's queries; 0 is "!" (Table 12)
    query_augmentation: bool = True  # pads take part in MeanMaxSim (4.2, Table 5)
    temporal_layers: int = 4  # layers of the temporal transformer (5.2, Table 8)
    visual_expansion: int = 2  # E, learned tokens added to the frames (4.2, 5.2)
    interaction: str = "mms"  # mms (MeanMaxSim) or mp (mean pooling, equation 1)
    loss: str = "sigmoid"  # sigmoid, infonce or what you add to LOSSES (4.3)
    loss_form: str = "dual"  # dual (equation 7) or combined (Table 4)
    lambda_frame: float = 1.0  # weight of the loss on MMS_F (equation 7)
    lambda_video: float = 1.0  # weight of the loss on MMS_V (equation 7)
    logit_scale: float = 4.77  # log t of equation 6; CLIP's, for infonce, is 4.6052
    logit_bias: float = -12.93  # b of equation 6, SigLIP's value (section 6)
    learn_scale: bool = False  # train log t and b; the paper fixes them
    freeze: bool = True  # freeze positions, patch and token embeddings (5.2)

# ---- Interaction (section 4.1)
def token_frame_similarities(Q, V):
    """Each token with each frame: Q (A, M, d), V (B, N, d) -> (A, M, B, N)."""
    # Autocast would round to 16 bits, and the loss multiplies errors by exp(4.77) = 118.
    with torch.autocast(Q.device.type, enabled=False):
        return torch.einsum("amd,bnd->ambn", Q, V)

def mean_max_sim(Q, V, mask=None):
    """Equations 3 and 4: the mean over query tokens of their best similarity to a frame.

    Q (A, M, d), V (B, N, d) -> (A, B). V may be the paper's F, too. The bool mask (A, M)
    says which tokens count; by default all do. Unit vectors give a mean of cosines;
    nothing is normalized here. A * M * B * N numbers are held in memory, so split large
    inputs."""
    sim = token_frame_similarities(Q, V)  # (A, M, B, N)
    best = sim.amax(dim=-1)  # (A, M, B), over frames
    if mask is None:
        return best.mean(dim=1)  # (A, B), over tokens
    weight = mask.to(best.dtype) / mask.sum(dim=1, keepdim=True)  # (A, M), sums to 1
    return (best * weight[..., None]).sum(dim=1)  # (A, B)

def mms_fv(mms_f, mms_v):
    """Equation 5: a video's score is the sum of MMS_F and MMS_V, both (A, B)."""
    return mms_f + mms_v

# ---- Losses (section 4.3)
# `positives` is bool (A, B). `logit_scale` is log t, as SigLIP stores it; it and the
# bias are numbers, or the model's parameters.
def diagonal(sim):
    """The default `positives`: query i describes video i."""
    A, B = sim.shape
    assert A == B, f"{A} queries and {B} videos have no diagonal: pass positives"
    return torch.eye(A, dtype=torch.bool, device=sim.device)

def sigmoid_loss(sim, positives=None, logit_scale=4.77, logit_bias=-12.93):
    """Equation 6 on similarities (A, B) -> a sum over videos, averaged over queries.

    The paper's formula, 1 / (1 + exp(z (-t x + b))), equals sigmoid(z (t x - b)). SigLIP's
    code adds b, and -12.93 was learned with it, so b is added here."""
    if positives is None:
        positives = diagonal(sim)
    z = torch.where(positives, 1.0, -1.0)  # (A, B)
    t = torch.as_tensor(logit_scale, dtype=sim.dtype).exp()  # exp(4.77) = 118
    loss = -logsigmoid(z * (t * sim + logit_bias))  # (A, B)
    return loss.sum() / len(sim)  # over A queries, not all pairs

def info_nce_loss(sim, positives=None, logit_scale=4.6052, logit_bias=0.0):
    """The baseline of section 4.3 on similarities (A, B) -> the mean of both directions.
    If a row or column has several positives, they share its target equally. All
    losses take a `logit_bias`; here it has no effect."""
    if positives is None:
        positives = diagonal(sim)
    t = torch.as_tensor(logit_scale, dtype=sim.dtype).exp()  # exp(4.6052) = 100
    logits = t * sim  # (A, B)
    target = positives.to(sim.dtype)  # (A, B)
    # With p=1, normalize divides by the sum of a row.
    text_to_video = cross_entropy(logits, normalize(target, p=1, dim=1))
    video_to_text = cross_entropy(logits.T, normalize(target.T, p=1, dim=1))
    return (text_to_video + video_to_text) / 2

LOSSES = {"sigmoid": sigmoid_loss, "infonce": info_nce_loss}

# ---- Backbone (section 5.2)
TINY = dict(  # for synthetic clips and tests
    embed_dim=64,
    vision_cfg=dict(image_size=48, patch_size=24, width=64, layers=2, head_width=32),
    text_cfg=dict(width=64, heads=2, layers=2))

FROZEN = ("text.positional_embedding", "text.token_embedding",
          "visual.positional_embedding", "visual.conv1",  # CLIP
          "visual.trunk.pos_embed", "visual.trunk.patch_embed")  # SigLIP

def load_backbone(name, pretrained):
    """-> an open_clip model, and the pixel mean and std that its weights expect. Raises
    InputError for a name or weights that cannot be used.

    open_clip.create_model does not suffice: it resizes positions silently, and only
    warns if model and weights differ in QuickGELU."""
    if name == "tiny":
        if pretrained not in ("auto", "none", None):
            raise InputError("the tiny backbone has no pretrained weights")
        model = open_clip.CustomTextCLIP(**TINY)
        # Untrained positions are too small compared with the patch embeddings; 4 was
        # found by trial.
        model.visual.positional_embedding.data *= 4
        return model, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD

    config = backbone_config(name)
    # CustomTextCLIP has its text encoder as a module of its own, model.text.
    model = open_clip.CustomTextCLIP(**config)

    tags = open_clip.list_pretrained_tags_by_model(name)
    default_tag = "webli" if "webli" in tags else "openai"
    if pretrained == "auto":
        pretrained = default_tag
    is_tag = pretrained in tags  # else a file, or none
    # A file does not say which pixel mean and std it needs: assume the default tag's.
    info = open_clip.get_pretrained_cfg(name, pretrained if is_tag else default_tag)
    mean = info.get("mean", open_clip.OPENAI_DATASET_MEAN)
    std = info.get("std", open_clip.OPENAI_DATASET_STD)
    if pretrained in (None, "none"):
        return model, mean, std

    # A tag says whether it needs QuickGELU; a file of open_clip does not.
    has_quick_gelu = config.get("quick_gelu", False)
    if is_tag and info.get("quick_gelu", False) != has_quick_gelu:
        raise InputError(f"weights {pretrained!r} and backbone {name!r} differ in QuickGELU, "
                         "which costs accuracy: add or drop -quickgelu in the name")

    try:
        file = open_clip.download_pretrained(info) if is_tag else pretrained
        load_weights(model, file, has_quick_gelu)
    except Exception as error:
        # OSError and ValueError say what is wrong. The many others that a damaged file can
        # raise do not.
        is_clear = isinstance(error, (OSError, ValueError))
        reason = shorten(str(error), 150) if is_clear else "damaged, or no weights"
        raise InputError(
            f"cannot load {pretrained!r} into {name}: {reason}. Use a file from OpenAI or "
            f"open_clip, none, or a tag: {', '.join(tags)}") from None
    return model, mean, std

def backbone_config(name):
    """open_clip's description of a model that is built like CLIP or SigLIP."""
    config = open_clip.get_model_config(name)
    if config is None:
        similar = difflib.get_close_matches(name, ["tiny", *open_clip.list_models()])
        raise InputError(f"unknown backbone {name!r}; similar names: {', '.join(similar)}")
    text = config["text_cfg"]
    is_resnet = isinstance(config["vision_cfg"].get("layers"), list)
    is_coca = "multimodal_cfg" in config
    tokenizer = text.get("hf_tokenizer_name")  # None is CLIP's own
    is_known_tokenizer = tokenizer is None or "SigLIP" in tokenizer
    # The temporal layers are copied text layers, so the text's width must be d.
    has_same_width = text.get("width") == config["embed_dim"]
    # encode_query needs a projection. A config that does not mention one has a matrix.
    has_projection = text.get("proj_type") != "none"
    has_usual_text = is_known_tokenizer and has_same_width and has_projection
    if is_resnet or is_coca or not has_usual_text:
        raise InputError(f"backbone {name!r} is not supported: it is a ResNet or CoCa, or "
                         "its text encoder is not like CLIP's or SigLIP's")
    config.pop("custom_text", None)  # CustomTextCLIP takes no such argument
    return config

# open_clip's training checkpoints also hold NumPy numbers. torch.load must be told to
# accept what makes them; the pair is for files that were written with NumPy 1.
scalar = np._core.multiarray.scalar
NUMPY_NUMBERS = [scalar, (scalar, "numpy.core.multiarray.scalar"),
                 np.dtype, np.dtypes.Int64DType, np.dtypes.Float64DType]

def load_weights(model, file, has_quick_gelu):
    """Load OpenAI's TorchScript archive, or what open_clip or safetensors saved, into an
    open_clip model. No pickled code in the file is run."""
    # OpenAI's files are TorchScript archives. Only such archives hold constants.pkl.
    names = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
    is_openai = any(name.endswith("/constants.pkl") for name in names)
    if is_openai:
        weights = torch.jit.load(file, map_location="cpu").state_dict()
    else:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            weights = open_clip.factory.load_state_dict(file)
    if "positional_embedding" in weights:  # named as in open_clip.CLIP
        weights = open_clip.model.convert_to_custom_text_state_dict(weights)

    # Each weight of the model must be in the file, which may hold more.
    for name, tensor in model.state_dict().items():
        fits = name in weights and weights[name].shape == tensor.shape
        # The backbone's own logit_scale and logit_bias are not used.
        if not fits and not name.startswith("logit_"):
            raise ValueError(f"it has no {name} of shape {tuple(tensor.shape)}")
    if is_openai and not has_quick_gelu:
        raise ValueError("OpenAI's models use QuickGELU: add -quickgelu to the name")
    model.load_state_dict(weights, strict=False)

# ---- Temporal transformer (sections 4.1, 4.2)
class TemporalTransformer(nn.Module):
    """Contextualizes the frames of a video: f (B, N, d) -> (B, N + E, d).

    The layers are copies of the text encoder's first ones; if there are too few, they
    repeat. The paper is silent on their weights; CLIP4Clip, X-CLIP and DRL copy them."""

    def __init__(self, config, text):
        super().__init__()
        layers = text.transformer.resblocks
        self.blocks = nn.ModuleList()
        for i in range(config.temporal_layers):
            self.blocks.append(copy.deepcopy(layers[i % len(layers)]))

        # Frame positions start as the text encoder's first ones, as in CLIP4Clip, DRL,
        # X-CLIP and UATVR (the paper is silent). The tiny model is untrained, and learns
        # motion faster from larger positions; 0.9 was found by trial.
        positions = text.positional_embedding[:config.num_frames].detach().clone()
        if config.backbone == "tiny":
            positions = 0.9 * torch.randn_like(positions)
        self.frame_positions = nn.Parameter(positions)  # (num_frames, d)
        expansion = 0.02 * torch.randn(config.visual_expansion, text.output_dim)
        self.visual_expansion = nn.Parameter(expansion)  # (E, d)

    def forward(self, f):
        expansion = self.visual_expansion.expand(len(f), -1, -1)  # (B, E, d)
        positions = self.frame_positions[:f.shape[1]]  # (N, d)
        x = torch.cat([f + positions, expansion], dim=1)  # (B, N + E, d)
        # open_clip's blocks take (B, N, d). Without a mask, all frames see each other.
        for block in self.blocks:
            x = block(x)
        # A residual around all layers, without the positions, as in CLIP4Clip (the paper
        # is silent).
        return x + torch.cat([f, expansion], dim=1)

# ---- Model (Figure 2)
class VideoColBERT(nn.Module):
    """The query encoder, frame encoder and temporal transformer of Figure 2.

    Q, F and V are float32 unit vectors, also under autocast. `image_size` is the side of
    a frame in pixels, `width` is d. Raises InputError for invalid settings."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone, mean, std = load_backbone(config.backbone, config.pretrained)
        text = self.backbone.text
        # SigLIP pools its last token, and pads its queries to the full context length.
        self.is_siglip = text.pool_type == "last"
        self.num_tokens = text.context_length if self.is_siglip else config.num_tokens
        self.check_config(text.context_length, text.token_embedding.num_embeddings)

        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad = not (config.freeze and name.startswith(FROZEN))
        # The loss has a scale and a bias of its own, below.
        self.backbone.logit_scale = None
        self.backbone.logit_bias = None

        # Frames have values from 0 to 255.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))
        self.image_size = self.backbone.visual.image_size[0]
        self.width = text.output_dim
        self.temporal = TemporalTransformer(config, text)
        is_learned = config.learn_scale
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale), is_learned)
        self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias), is_learned)
        self.norms_checked = False  # `similarities` checks them once

    def check_config(self, context_length, vocabulary):
        choices = dict(interaction=("mms", "mp"), loss=LOSSES, loss_form=("dual", "combined"))
        for name, allowed in choices.items():
            value = getattr(self.config, name)
            if value not in allowed:
                raise InputError(f"{name} must be {' or '.join(allowed)}, not {value}")

        # At least the start, a word and the end.
        if not 3 <= self.num_tokens <= context_length:
            raise InputError(f"num_tokens must be 3 to {context_length}")
        # Frame positions are copied from the text's, so there are at most context_length.
        ranges = dict(num_frames=(1, context_length), pad_token=(0, vocabulary - 1),
                      temporal_layers=(1, 1000), visual_expansion=(0, 1000))
        for name, (low, high) in ranges.items():
            value = getattr(self.config, name)
            if not low <= value <= high:
                raise InputError(f"{name} must be {low} to {high}, not {value}")

    @property
    def device(self):
        return self.mean.device

    @cached_property
    def tokenizer(self):
        name = "ViT-B-32" if self.config.backbone == "tiny" else self.config.backbone
        try:
            return open_clip.get_tokenizer(name)
        except OSError:
            raise InputError(f"the tokenizer of {name} must be downloaded once") from None

    def real_tokens(self, ids):
        """ids (A, M) -> bool (A, M): True up to the end token, False for pads."""
        if self.is_siglip:
            # open_clip wraps the tokenizer of transformers.
            end = self.tokenizer.tokenizer.eos_token_id
        else:
            end = self.tokenizer.eot_token_id
        # SigLIP's pads are end tokens as well, so take the first one, as argmax does.
        first_end = (ids == end).int().argmax(dim=1, keepdim=True)  # (A, 1)
        return torch.arange(ids.shape[1], device=ids.device) <= first_end

    def tokenize(self, texts):
        """A strings -> ids int64 (A, M), mask bool (A, M) of the tokens that count.

        With query augmentation (section 4.2) all count, without it all but the pads. With
        mean pooling only the pooled token counts. A caption that is too long is cut, but
        keeps its end token."""
        ids = self.tokenizer(texts, context_length=self.num_tokens)  # (A, M)
        real = self.real_tokens(ids)
        if not self.is_siglip:
            ids = ids.where(real, self.config.pad_token)

        if self.config.interaction == "mp":
            # CLIP pools the end token, the last real one; SigLIP pools the last of all.
            last = real.sum(dim=1) - 1  # (A,)
            if self.is_siglip:
                last = torch.full_like(last, self.num_tokens - 1)
            mask = one_hot(last, self.num_tokens).bool()
        elif self.config.query_augmentation:
            mask = torch.ones_like(real)
        else:
            mask = real
        return ids, mask

    def encode_query(self, ids):
        """ids (A, M) from tokenize -> Q (A, M, d), a unit vector for each token, also for
        pads. open_clip projects one token of a text; here all are projected."""
        text = self.backbone.text
        M = ids.shape[1]
        x = text.token_embedding(ids) + text.positional_embedding[:M]  # (A, M, d)
        # CLIP's causal mask hides pads from the words; SigLIP has none.
        causal = None if text.attn_mask is None else text.attn_mask[:M, :M]
        x = text.ln_final(text.transformer(x, attn_mask=causal))
        # SigLIP's projection is a layer, CLIP's is a matrix.
        project = text.text_projection
        x = project(x) if isinstance(project, nn.Linear) else x @ project
        return normalize(x.float(), dim=-1)  # (A, M, d)

    def encode_video(self, frames):
        """uint8 RGB frames (B, N, 3, image_size, image_size), N at most num_frames ->
        F (B, N, d), V (B, N + E, d). Raises ValueError for other frames."""
        B, N, *picture = frames.shape
        max_frames, size = self.config.num_frames, self.image_size
        has_shape = B > 0 and 1 <= N <= max_frames and picture == [3, size, size]
        if frames.dtype != torch.uint8 or not has_shape:
            raise ValueError(f"frames must be uint8 (B, 1 to {max_frames}, 3, {size}, {size}), "
                             f"not {frames.dtype} {tuple(frames.shape)}")

        images = (frames.flatten(0, 1) - self.mean) / self.std  # (B N, 3, H, W)
        # CLIP's projected [CLS] token; SigLIP has none and pools by attention.
        f = self.backbone.visual(images).view(B, N, -1)  # (B, N, d)
        v = self.temporal(f)  # (B, N + E, d)

        # A check for those who write another temporal module.
        expected = (B, N + self.config.visual_expansion, self.width)
        assert v.shape == expected, f"temporal: {tuple(v.shape)}, not {expected}"
        return normalize(f.float(), dim=-1), normalize(v.float(), dim=-1)

    def similarities(self, Q, mask, F, V):
        """Q (A, M, d), mask (A, M), F (B, N, d), V (B, N + E, d) -> MMS_F, MMS_V (A, B).
        With mean pooling, `mask` keeps one token and a video becomes one vector, so that
        MeanMaxSim is equation 1."""
        # A check for those who change the encoders: without unit length, training fails
        # silently.
        if not self.norms_checked:
            for x in (Q, F, V):
                is_unit = (x.norm(dim=-1) - 1).abs() < 1e-3
                assert is_unit.all(), "Q, F and V must have unit length: normalize them"
            self.norms_checked = True

        if self.config.interaction == "mp":
            N = F.shape[1]
            F = normalize(F.mean(dim=1, keepdim=True), dim=-1)  # (B, 1, d)
            # The expansion tokens are left out of V's mean.
            V = normalize(V[:, :N].mean(dim=1, keepdim=True), dim=-1)  # (B, 1, d)
        return mean_max_sim(Q, F, mask), mean_max_sim(Q, V, mask)

    def compute_loss(self, Q, mask, F, V, positives=None):
        """The inputs of `similarities`, and positives (A, B), by default the diagonal ->
        loss, MMS_F (A, B), MMS_V (A, B)."""
        mms_f, mms_v = self.similarities(Q, mask, F, V)
        criterion = LOSSES[self.config.loss]
        scale, bias = self.logit_scale, self.logit_bias

        if self.config.loss_form == "combined":
            loss = criterion(mms_fv(mms_f, mms_v), positives, scale, bias)
        else:
            # Equation 7: each level has its own loss, so each must rank well alone.
            loss_F = criterion(mms_f, positives, scale, bias)
            loss_V = criterion(mms_v, positives, scale, bias)
            loss = self.config.lambda_frame * loss_F + self.config.lambda_video * loss_V
        return loss, mms_f, mms_v

    def forward(self, ids, mask, frames, positives=None):
        """-> a batch's loss, MMS_F and MMS_V."""
        Q = self.encode_query(ids)
        F, V = self.encode_video(frames)
        return self.compute_loss(Q, mask, F, V, positives)

    def save(self, folder):
        """Write config.json and model.safetensors into `folder`."""
        # Only the fields of Config, because train.py's Settings has more.
        config = {field.name: getattr(self.config, field.name) for field in fields(Config)}
        files = {"config.json": json.dumps(config, indent=2).encode(),
                 "model.safetensors": safetensors.torch.save(self.state_dict())}

        # Both are written in full before they replace an older model.
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with open(Path(folder, f"{name}.part"), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(Path(folder, f"{name}.part"), Path(folder, name))

    @classmethod
    def load(cls, folder):
        """What `save` wrote, in eval mode. Raises InputError if there is no model."""
        try:
            config = Config(**json.loads(Path(folder, "config.json").read_text()))
            # The weights are in the folder, so none are downloaded.
            model = cls(replace(config, pretrained="none"))
            weights = safetensors.torch.load_file(Path(folder, "model.safetensors"))
            model.load_state_dict(weights)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder} holds no model: {shorten(str(error), 200)}") from None
        model.config = config  # undo pretrained="none" from above
        return model.eval()

# ---- Frames of a video file (section 5.2)
def sample_frames(path, num_frames, size, start=0.0, end=None):
    """TSN-style sampling: a video, or its part from `start` to `end`, is cut into
    `num_frames` equal segments, and each gives the frame in its middle (the paper does not
    say which frame). Seconds count from the first frame.

    -> uint8 RGB (num_frames, 3, size, size), resized without keeping the aspect ratio.
    Raises VideoError."""
    timing = frame_times(path)
    wanted = sample_times(path, timing, num_frames, start, end)
    return frames_at(path, timing, wanted, size)

class Timing(NamedTuple):
    """When the frames of a video appear. A tick is the unit of `times`."""
    times: np.ndarray  # of all frames in ticks, sorted
    end: int  # when the last frame leaves the screen, in ticks
    tick: float  # in seconds
    # Whether to find a decoded frame by its pts (presentation time). If not, as in AVI
    # and joined files, the i-th decoded frame appears at times[i].
    pts_are_reliable: bool

# PyAV before version 19 must be told to open files whose metadata is not UTF-8.
OPEN_OPTIONS = {}
if int(av.__version__.split(".")[0]) < 19:
    OPEN_OPTIONS = {"metadata_errors": "ignore"}

@contextlib.contextmanager
def open_video(path):
    """-> container, video stream, is_exact: whether the format stores exact times of
    frames, unlike AVI. Raises VideoError."""
    try:
        # An absolute path, because FFmpeg may take a relative one with a colon for a URL.
        with av.open(os.path.join(os.getcwd(), path), **OPEN_OPTIONS) as container:
            stream = container.streams.best("video")
            if not stream or not stream.codec_context:
                raise VideoError(f"{path}: no video stream of a known codec")
            if stream.disposition & av.stream.Disposition.attached_pic:
                raise VideoError(f"{path}: no video stream but a cover picture")
            # Many videos are decoded at once, each by one thread.
            stream.codec_context.thread_count = 1
            # The name lists several formats, the main one first, such as "mov,mp4,m4a".
            exact_formats = ("mov", "matroska", "mpegts", "flv")
            yield container, stream, container.format.name.startswith(exact_formats)
    # This also catches errors of the caller's `with` block, which decodes.
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: {error.strerror or error}") from None

def decode(path, start=None):
    """Yield frames in the order of display. With `start`, a time in ticks, begin at the
    keyframe before it."""
    with open_video(path) as (container, stream, _):
        if start is not None:
            container.seek(start, stream=stream)
        yield from container.decode(stream)

def frame_times(path):
    """-> Timing. Files without exact times must be decoded to find them."""
    times, durations, decoding_times = [], [], []
    with open_video(path) as (container, stream, is_exact):
        tick = float(stream.time_base)
        frame_rate = float(stream.average_rate or 25)  # 25 if unknown
        for packet in container.demux():
            # An MP4 file was cut off here. In other formats, players skip damaged parts.
            if packet.is_corrupt and container.format.name.startswith("mov"):
                raise VideoError(f"{path}: only a part of the file is there")
            if packet.stream_index != stream.index:
                continue
            # Skip the empty last packet, and frames that the file says not to show.
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
                durations.append(packet.duration)
                if packet.dts is not None:
                    decoding_times.append(packet.dts)

    # Decoding times jump back by more than a second where files were joined into one.
    is_joined = (np.diff(decoding_times) * tick < -1).any()
    pts_are_reliable = is_exact and not is_joined and None not in times
    if not pts_are_reliable:
        decoded = [frame.pts for frame in decode(path)]
        durations = [0] * len(decoded)  # unknown
        if is_joined or None in decoded:
            # No times, or wrong ones: assume a constant rate.
            times = range(len(decoded))
            tick = 1 / frame_rate
        else:
            # AVI, for example, gives the right times to the wrong frames of H.264. So they
            # are sorted below, and the i-th frame takes the i-th time.
            times = decoded

    if not times:
        raise VideoError(f"{path}: no frame can be decoded")

    # Packets come in the order of decoding, so the last frame need not come last.
    duration = durations[np.argmax(times)]  # of the last frame
    times = np.sort(times)
    if not duration:
        # The mean gap between frames, at least one tick.
        duration = max(1, (times[-1] - times[0]) // max(1, len(times) - 1))
    return Timing(times, times[-1] + duration, tick, pts_are_reliable)

def sample_times(path, timing, num_frames, start=0.0, end=None):
    """The times, (num_frames,) in ticks, of the frames that sample_frames takes."""
    times, tick = timing.times, timing.tick
    length = float(timing.end - times[0]) * tick  # of the video in seconds
    end = length if end is None else min(end, length)
    if num_frames < 1 or not 0 <= start < end:
        raise VideoError(
            f"{path}: cannot take {num_frames} frames between {start} and {end} s")

    # Rounded to 0.001 ticks, because a floating-point error could move a time to just
    # before the frame that appears then.
    seconds = sample_seconds(num_frames, start, end)
    assert (np.diff(seconds) >= 0).all(), "sample_seconds must be ascending"
    moments = times[0] + np.round(seconds / tick, 3)
    # For each moment, the last frame that has appeared by then.
    return times[np.searchsorted(times, moments, side="right") - 1]

def sample_seconds(num_frames, start, end):
    """The middles, (num_frames,) in seconds and ascending, of equal segments."""
    return start + (np.arange(num_frames) + 0.5) / num_frames * (end - start)

def frames_at(path, timing, wanted, size):
    """The frames on screen at the sorted times `wanted` -> uint8 (N, 3, size, size)."""
    if timing.pts_are_reliable:
        frames = decode(path, seek_time(path, timing, int(wanted[0])))
        timed_frames = ((frame.pts, frame) for frame in frames if frame.pts is not None)
    else:
        timed_frames = zip(timing.times, decode(path))

    scaler = VideoReformatter()
    remaining, pixels, previous = deque(wanted), [], None
    for time, frame in timed_frames:
        # Once a frame is later than a wanted time, the one before it was on screen then.
        while remaining and remaining[0] < time:
            remaining.popleft()
            on_screen = previous or frame  # the first frame, if none is before it
            pixels.append(upright_pixels(on_screen, size, scaler))
        previous = frame
        if not remaining:
            break

    if not previous:
        raise VideoError(f"{path}: no frame can be decoded")
    # The last frame stays on screen.
    pixels += [upright_pixels(previous, size, scaler) for _ in remaining]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()

def seek_time(path, timing, first):
    """A time to seek to, from which decoding reaches the frame at time `first`. None is
    the beginning of the file."""
    # A seek in MPEG-TS may land too late. So look at the frame that it finds. If that is
    # too late, seek 10 seconds earlier; if that fails, too, start at the beginning.
    for target in (first, first - round(10 / timing.tick)):
        if target <= timing.times[0]:
            return None
        with contextlib.suppress(VideoError):  # there may be no keyframe before it
            frame = next(decode(path, target), None)
            if frame and frame.key_frame and frame.pts is not None and frame.pts <= first:
                return target
    return None

def upright_pixels(frame, size, scaler):
    """A frame as uint8 (size, size, 3), turned as its display matrix says."""
    frame_rgb = scaler.reformat(
        frame, size, size, "rgb24", interpolation="BICUBIC", threads=1)
    pixels = frame_rgb.to_ndarray()

    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels

    # A pixel moves from (x, y) to (a x + c y, b x + d y). Upright, b and c are 0; in a
    # quarter turn, a and d are 0. So a sum below is the number that is not 0.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels = pixels.swapaxes(0, 1)
    if a + c < 0:
        pixels = pixels[:, ::-1]  # mirror left and right
    if b + d < 0:
        pixels = pixels[::-1]  # mirror top and bottom
    return pixels

# ---- Metrics (section 5.3)
def ranks(sim):
    """sim (A, B) -> the rank of each video for each query, int (A, B), 1 is best. Ties
    count against the model: a rank is the number of videos with at least that score."""
    sim = sim.contiguous()  # otherwise searchsorted warns about a copy
    ascending = sim.sort(dim=1).values
    number_below = torch.searchsorted(ascending, sim)  # (A, B)
    return sim.shape[1] - number_below

def retrieval_metrics(sim, target):
    """sim (A, B), the index of each query's video (A,) -> R@1, R@5, R@10 in percent,
    nDCG@10 from 0 to 1, median and mean rank. ValueError for NaN and for no queries."""
    sim, target = torch.as_tensor(sim), torch.as_tensor(target, dtype=torch.int64)
    assert len(sim) == len(target), f"{len(sim)} queries, but {len(target)} targets"
    if len(sim) == 0 or sim.isnan().any():
        raise ValueError("there are no queries, or the similarities hold NaN")

    rank = ranks(sim).gather(1, target[:, None]).flatten().double()  # (A,)
    metrics = {f"R@{k}": 100 * (rank <= k).double().mean().item() for k in (1, 5, 10)}
    # A query has one relevant video.
    gain = torch.where(rank <= 10, 1 / torch.log2(1 + rank), 0)
    metrics["nDCG@10"] = gain.mean().item()
    metrics["MdR"] = rank.quantile(0.5).item()
    metrics["MnR"] = rank.mean().item()
    return metrics

def video_to_text(sim, target):
    """sim (A, B), target (A,) -> (G, G): row i is the i-th of the G videos that have
    captions, column j the best caption of the j-th, as in CLIP4Clip. The true pairs are
    on the diagonal."""
    videos = target.unique()  # (G,)
    columns = [sim[target == video].amax(dim=0) for video in videos]  # G columns (B,)
    best = torch.stack(columns, dim=1)  # (B, G)
    return best[videos]  # (G, G)

def reciprocal_rank_fusion(mms_f, mms_v, k=60):
    """Section 6: two matrices of similarities (A, B) -> the sum of 1 / (k + rank), (A, B)."""
    return 1 / (k + ranks(mms_f).double()) + 1 / (k + ranks(mms_v).double())
