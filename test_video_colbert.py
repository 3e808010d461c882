"""Each test states the claim it checks. `pytest` needs no GPU, no network, no weights and no dataset."""
import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch.nn.functional import cross_entropy, logsigmoid, normalize
from torch.utils._python_dispatch import TorchDispatchMode

import train
import video_colbert
from video_colbert import (Config, VideoColBERT, combined_loss, draw_interactions, dual_loss, info_nce_loss, interactions,
                           mean_max_sim, retrieval_metrics, sample_frames, sigmoid_loss)


def unit(*shape, dtype=torch.float32):
    return normalize(torch.randn(*shape, dtype=dtype), dim=-1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return VideoColBERT(Config(backbone="tiny", num_frames=6)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# MeanMaxSim (equations 3 and 4)

def loop(Q, V, mask):
    """Equation 3, written out, in float64."""
    out = torch.zeros(len(Q), len(V), dtype=torch.float64)
    for a, b in itertools.product(range(len(Q)), range(len(V))):
        best = [max(float(q.double() @ v.double()) for v in V[b]) for q, m in zip(Q[a], mask[a]) if m]
        out[a, b] = sum(best) / len(best)
    return out


def naive(Q, V, mask=None):
    best = torch.einsum("amd,bnd->abmn", Q, V).max(-1).values                # (A, B, M)
    mask = torch.ones_like(Q[..., 0]) if mask is None else mask.to(Q.dtype)
    return (best * mask[:, None]).sum(-1) / mask.sum(-1)[:, None]


@pytest.mark.parametrize("A, B, M, N", [(5, 7, 6, 4), (1, 1, 1, 1), (4, 3, 1, 5), (3, 4, 5, 1), (2, 3, 64, 66)])
def test_mean_max_sim_equals_a_float64_loop(A, B, M, N):
    Q, V, mask = unit(A, M, 16), unit(B, N, 16), torch.rand(A, M) < 0.6
    mask[:, 0] = True
    assert (mean_max_sim(Q, V, mask).double() - loop(Q, V, mask)).abs().max() < 1e-6
    assert (mean_max_sim(Q, V).double() - loop(Q, V, torch.ones(A, M))).abs().max() < 1e-6


def test_mean_max_sim_goes_one_way_only():
    """Query tokens choose frames: a frame that nobody picks changes nothing, a query token always counts."""
    Q, V = unit(2, 3, 8), unit(2, 4, 8)
    worse = torch.cat([V, -Q[:, :1]], dim=1)
    assert torch.equal(mean_max_sim(Q, V)[0, 0], mean_max_sim(Q, worse)[0, 0])
    assert not torch.equal(mean_max_sim(Q[:, :2], V), mean_max_sim(Q, V))


@pytest.mark.parametrize("B", [7, 1500])
def test_mean_max_sim_has_the_gradients_of_the_naive_form(B):
    Q, V, G = unit(9, 5, 16, dtype=torch.float64), unit(B, 6, 16, dtype=torch.float64), torch.randn(9, B, dtype=torch.float64)
    mask = torch.rand(9, 5) < 0.7
    mask[:, 0] = True
    grads = []
    for form in (mean_max_sim, naive):
        q, v = Q.clone().requires_grad_(), V.clone().requires_grad_()
        (form(q, v, mask) * G).sum().backward()
        grads.append((q.grad, v.grad))
    for got, want in zip(*grads):
        assert (got - want).abs().max() < 1e-10


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes, forward or backward."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_mean_max_sim_never_holds_the_big_tensor():
    """No tensor of either pass reaches a tenth of A x B x M x N."""
    Q, V = unit(256, 32, 8).requires_grad_(), unit(2048, 14, 8).requires_grad_()
    with Largest() as largest:
        mean_max_sim(Q, V).sum().backward()
    assert largest.numel < 256 * 2048 * 32 * 14 / 10


def test_mean_max_sim_stays_in_float32_under_autocast():
    Q, V = unit(4, 5, 16), unit(6, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        sim = mean_max_sim(Q, V)
    assert sim.dtype == torch.float32 and torch.equal(sim, mean_max_sim(Q, V))


# ---------------------------------------------------------------------------------------------------------------------
# Losses (equations 6 and 7) and the four traps of the paper

@pytest.mark.parametrize("B", [1, 2, 33])
def test_sigmoid_loss_equals_open_clips_siglip_loss(B):
    image, text = unit(B, 8, dtype=torch.float64), unit(B, 8, dtype=torch.float64)
    want = SigLipLoss()(image, text, math.exp(4.77), -12.93)
    assert (sigmoid_loss(image @ text.T) - want).abs() < 1e-6
    assert abs(sigmoid_loss((image @ text.T).float()) / want - 1) < 1e-6


def test_sigmoid_loss_equals_equation_6_in_float64():
    """With any positives: -1/B sum_i sum_j log sigmoid(z (t x + b)), t = exp(logit_scale)."""
    sim, positives = torch.rand(6, 6, dtype=torch.float64) * 2 - 1, torch.rand(6, 6) < 0.3
    want = 0.0
    for i, j in itertools.product(range(6), range(6)):
        z = 1 if positives[i, j] else -1
        want -= -math.log1p(math.exp(-z * (math.exp(2.5) * sim[i, j].item() - 3.0))) / 6
    assert abs(sigmoid_loss(sim, positives, 2.5, -3.0).item() + -want) < 1e-9


def test_trap_1_logit_scale_is_a_logarithm():
    """A pair of cosine 1 is classified as true, which a raw t = 4.77 could never do."""
    assert sigmoid_loss(torch.ones(1, 1)) < 1e-6
    assert -logsigmoid(torch.tensor(4.77 - 12.93)) > 8


def test_trap_2_the_bias_is_added_not_subtracted():
    """At the start, with all similarities 0, a negative costs next to nothing and a positive about 12.93."""
    assert abs(sigmoid_loss(torch.zeros(4, 4)).item() - 12.93) < 1e-3


def test_trap_3_scale_and_bias_are_fixed_unless_asked_for(tiny):
    assert (tiny.logit_scale.item(), tiny.logit_bias.item()) == (pytest.approx(4.77), pytest.approx(-12.93))
    assert not tiny.logit_scale.requires_grad and not tiny.logit_bias.requires_grad
    learned = VideoColBERT(Config(backbone="tiny", learn_scale=True))
    assert learned.logit_scale.requires_grad and learned.logit_bias.requires_grad


def test_trap_4_all_vectors_are_of_unit_length(tiny):
    frames = torch.randint(0, 256, (2, 6, 3, 64, 64), dtype=torch.uint8)
    Q = tiny.encode_query(*tiny.tokenize(["a", "two words"]))
    for x, shape in zip((Q, *tiny.encode_video(frames)), ((2, 32, 64), (2, 6, 64), (2, 8, 64))):
        assert x.shape == shape and x.dtype == torch.float32
        assert (x.norm(dim=-1) - 1).abs().max() < 1e-6


def test_a_second_caption_of_a_video_is_a_positive():
    """Marking the off-diagonal pair of one video as positive turns its high similarity from a cost into a gain."""
    sim = torch.eye(3)
    sim[0, 1] = sim[1, 0] = 1.0
    positives = sim.bool()
    assert sigmoid_loss(sim, positives) < 1e-4 < 50 < sigmoid_loss(sim)


def test_the_losses_take_k_captions_a_video():
    """A (kB, B) matrix with k positives a column is the mean over its rows of what each row costs."""
    sim, positives = torch.rand(6, 3), torch.eye(3, dtype=torch.bool).repeat_interleave(2, 0)
    rows = [sigmoid_loss(sim[i:i + 1], positives[i:i + 1]) for i in range(6)]
    assert abs(sigmoid_loss(sim, positives) - torch.stack(rows).mean()) < 1e-4


@pytest.mark.parametrize("B", [1, 2, 17])
def test_info_nce_equals_open_clips_clip_loss(B):
    image, text = unit(B, 8), unit(B, 8)
    assert (info_nce_loss(image @ text.T, logit_scale=math.log(50.0)) - ClipLoss()(image, text, 50.0)).abs() < 1e-5


def test_info_nce_is_symmetric_and_shares_a_target_among_positives():
    sim, positives = torch.rand(5, 5), torch.eye(5, dtype=torch.bool)
    positives[0, 3] = positives[3, 0] = True
    assert abs(info_nce_loss(sim, positives) - info_nce_loss(sim.T, positives.T)) < 1e-6
    logits = 100 * sim.double()
    rows = [-logits[i].log_softmax(0)[positives[i]].mean() for i in range(5)]
    columns = [-logits[:, j].log_softmax(0)[positives[:, j]].mean() for j in range(5)]
    want = (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2
    assert abs(info_nce_loss(sim, positives, math.log(100)).double() - want) < 1e-5


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
@pytest.mark.parametrize("form", ["dual", "combined"])
def test_the_model_trains_with_the_loss_that_its_config_names(loss, form):
    model = VideoColBERT(Config(backbone="tiny", num_frames=2, loss=loss, loss_form=form, lambda_frame=0.5, lambda_video=2.0))
    ids, mask = model.tokenize(["one", "two", "three"])
    total, sim_F, sim_V = model(ids, mask, torch.randint(0, 256, (3, 2, 3, 64, 64), dtype=torch.uint8))
    single = {"sigmoid": lambda x: sigmoid_loss(x), "infonce": lambda x: info_nce_loss(x, logit_scale=4.77)}[loss]
    want = 0.5 * single(sim_F) + 2.0 * single(sim_V) if form == "dual" else single(sim_F + sim_V)
    assert abs(total - want) < 1e-5
    total.backward()


# ---------------------------------------------------------------------------------------------------------------------
# Encoders, against open_clip's own

REAL = ["ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-B-16-SigLIP"]


@pytest.fixture(scope="module", params=REAL)
def real(request):
    """A randomly initialised model of each of the paper's backbones."""
    torch.manual_seed(0)
    return VideoColBERT(Config(backbone=request.param, pretrained=None, num_frames=2))


def test_one_token_of_q_is_open_clips_text_embedding(real):
    """End token for CLIP, last token for SigLIP; 32 tokens of CLIP give what its own 77 give."""
    if real.is_siglip:
        ids = torch.randint(2, 32000, (3, 64))
        Q = real.encode_query(ids, torch.ones_like(ids, dtype=torch.bool))
        got, theirs = Q[:, -1], ids
    else:
        texts = ["a man feeds a dog", "x", "word " * 50]
        ids, mask = real.tokenize(texts)
        assert ids.shape == (3, 32)
        got = real.encode_query(ids, mask)[range(3), real.real_tokens(ids).sum(1) - 1]
        theirs = open_clip.get_tokenizer(real.config.backbone)(texts[:2])
        got = got[:2]                                                       # the third is cut, so differs by design
    with torch.no_grad():
        assert (got - real.clip.encode_text(theirs, normalize=True)).abs().max() < 1e-5


def test_f_is_open_clips_image_embedding(real):
    frames = torch.randint(0, 256, (1, 2, 3, 224, 224), dtype=torch.uint8)
    mean, std = ((0.5,) * 3, (0.5,) * 3) if real.is_siglip else (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    images = (frames[0].float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        F, V = real.encode_video(frames)
        assert (F[0] - real.clip.encode_image(images, normalize=True)).abs().max() < 1e-5
    assert V.shape == (1, 4, F.shape[-1]) and F.shape[-1] == (768 if real.is_siglip else 512)


def test_the_right_parameters_are_frozen_and_in_the_right_groups_and_a_step_moves_just_the_others(real):
    """Section 5.2: positions, patch and token embeddings frozen; 1e-7 for what is pre-trained, 1e-4 for what is new."""
    frozen = {n for n, p in real.named_parameters() if not p.requires_grad}
    vision = {"visual.trunk.pos_embed", "visual.trunk.patch_embed.proj.weight", "visual.trunk.patch_embed.proj.bias"} \
        if real.is_siglip else {"visual.positional_embedding", "visual.conv1.weight"}
    assert frozen == {"clip." + n for n in vision | {"text.positional_embedding", "text.token_embedding.weight"}} \
        | {"logit_scale", "logit_bias"}

    s = train.Settings(lr=0.1, lr_pretrained=0.05)                          # large, so that a step is seen
    optimizer = train.make_optimizer(real, s)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}
    for name, p in real.named_parameters():
        want = None if name in frozen else "pretrained" if name.startswith("clip.") else "new"
        assert [g for g, ids in groups.items() if id(p) in ids] == ([want] if want else []), name
    default = {g["name"]: g for g in train.make_optimizer(real, train.Settings()).param_groups}
    assert (default["pretrained"]["lr"], default["new"]["lr"]) == (1e-7, 1e-4)
    assert all(g["betas"] == (0.9, 0.98) and g["eps"] == 1e-6 and g["weight_decay"] == 0.01 for g in default.values())

    before = {n: p.detach().clone() for n, p in real.named_parameters()}
    ids = torch.randint(2, 32000, (2, real.num_tokens))
    ids[:, -1] = 49407 if not real.is_siglip else 1
    frames = torch.randint(0, 256, (2, 2, 3, 224, 224), dtype=torch.uint8)
    loss, _, _ = real(ids, torch.ones_like(ids, dtype=torch.bool), frames)
    loss.backward()
    optimizer.step()
    same = {n for n, p in real.named_parameters() if torch.equal(p, before[n])}
    with torch.no_grad():
        for n, p in real.named_parameters():
            p.copy_(before[n])
    real.zero_grad()
    assert same == frozen


def test_the_temporal_transformer_starts_as_the_text_encoders_first_layers(real):
    for i, block in enumerate(real.temporal):
        theirs = real.clip.text.transformer.resblocks[i].state_dict()
        assert all(torch.equal(p, theirs[n]) for n, p in block.state_dict().items())
        assert block.mlp.c_fc.weight.data_ptr() != real.clip.text.transformer.resblocks[i].mlp.c_fc.weight.data_ptr()
    assert len(real.temporal) == 4


def test_weights_are_loaded_from_a_file(tmp_path):
    """What open_clip saved for a backbone is what the encoders hold, the temporal layers included."""
    theirs = open_clip.create_model("ViT-B-32-quickgelu")
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    model = VideoColBERT(Config(pretrained=str(tmp_path / "weights.pt")))
    assert torch.equal(model.clip.visual.conv1.weight, theirs.visual.conv1.weight)
    assert torch.equal(model.temporal[3].mlp.c_fc.weight, theirs.transformer.resblocks[3].mlp.c_fc.weight)
    with pytest.raises(ValueError, match="weights.pt does not hold the weights of ViT-B-16-quickgelu"):
        VideoColBERT(Config(backbone="ViT-B-16-quickgelu", pretrained=str(tmp_path / "weights.pt")))


@pytest.mark.parametrize("config, message", [
    (dict(backbone="ViT-B32", pretrained=None), "unknown backbone 'ViT-B32'; near names: .*ViT-B-32"),
    (dict(backbone="ViT-B-32"), "differ in QuickGELU; use the name with -quickgelu"),
    (dict(pretrained="laion"), "no weights 'laion' for ViT-B-32-quickgelu: give a file, none, or one of .*openai"),
    (dict(backbone="coca_ViT-B-32", pretrained=None), "is not a CLIP or SigLIP"),
    (dict(backbone="RN101-quickgelu", pretrained=None), "is not a CLIP or SigLIP"),
    (dict(backbone="convnext_tiny", pretrained=None), "512 wide, its output 1024"),
    (dict(backbone="tiny", num_tokens=100), "num_tokens must be 3 to 77"),
    (dict(backbone="tiny", num_frames=0), "num_frames and temporal_layers must be at least 1"),
])
def test_a_setting_that_cannot_be_is_named_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as error:
        VideoColBERT(Config(**config))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Query side

def test_clip_queries_are_start_words_end_and_pads(tiny):
    ids, mask = tiny.tokenize(["a dog !", "a!!!b", ""])
    assert ids.dtype == torch.int64 and ids.shape == mask.shape == (3, 32) and mask.all()
    assert ids[0].tolist() == [49406, 320, 1929, 256, 49407] + [0] * 27
    assert ids[2].tolist() == [49406, 49407] + [0] * 30


def test_a_caption_that_is_too_long_keeps_its_end_token(tiny):
    ids, _ = tiny.tokenize(["dog " * 10_000])
    assert ids[0].tolist() == [49406] + [1929] * 30 + [49407]


@pytest.mark.parametrize("pad", [31, 49407, 3002, 13530, 49406, 0])
def test_every_pad_token_of_table_12_fills_the_query_and_nothing_else(pad):
    model = VideoColBERT(Config(backbone="tiny", pad_token=pad))
    ids, _ = model.tokenize(["a dog"])
    assert ids[0].tolist() == [49406, 320, 1929, 49407] + [pad] * 28
    assert model.real_tokens(ids)[0].tolist() == [True] * 4 + [False] * 28


def test_without_query_augmentation_pads_count_for_nothing():
    """The score is that of the words alone, whatever the pad token and the length."""
    torch.manual_seed(0)
    model = VideoColBERT(Config(backbone="tiny", num_frames=3, query_augmentation=False)).eval()
    F, _ = model.encode_video(torch.randint(0, 256, (4, 3, 3, 64, 64), dtype=torch.uint8))
    ids, mask = model.tokenize(["a dog", "a small dog runs"])
    assert mask.sum(1).tolist() == [4, 6]
    want = mean_max_sim(model.encode_query(ids, mask), F, mask)
    model.config.pad_token, model.num_tokens = 3002, 20
    ids, mask = model.tokenize(["a dog", "a small dog runs"])
    Q = model.encode_query(ids, mask)
    assert (mean_max_sim(Q, F, mask) - want).abs().max() < 1e-6
    assert (Q[~mask] == 0).all()
    model.config.query_augmentation = True
    ids, mask = model.tokenize(["a dog", "a small dog runs"])
    assert mask.all() and (mean_max_sim(model.encode_query(ids, mask), F, mask) - want).abs().max() > 1e-3


def test_siglip_queries_are_64_long_with_its_own_pad_and_end(tmp_path):
    """With a tokenizer of the same kind, pad and end alike `</s>`; the real one comes from the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "dog": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="</s>", eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    model = VideoColBERT(Config(backbone="ViT-B-16-SigLIP", pretrained=None, query_augmentation=False, pad_token=31))
    model.tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64, clean="canonicalize")
    ids, mask = model.tokenize(["A dog!", "dog " * 100])
    assert ids[0].tolist() == [2, 3] + [1] * 62 and mask[0].sum() == 3
    assert ids[1].tolist() == [3] * 63 + [1] and mask[1].all()


# ---------------------------------------------------------------------------------------------------------------------
# Video side

def test_frames_alone_ignore_their_order_and_the_temporal_level_sees_it(tiny):
    frames = torch.randint(0, 256, (1, 6, 3, 64, 64), dtype=torch.uint8)
    Q = tiny.encode_query(*tiny.tokenize(["a dog"]))
    (F, V), (F_, V_) = tiny.encode_video(frames), tiny.encode_video(frames.flip(1))
    assert (mean_max_sim(Q, F) - mean_max_sim(Q, F_)).abs() < 1e-6 and (F - F_.flip(1)).abs().max() < 1e-5
    assert (mean_max_sim(Q, V) - mean_max_sim(Q, V_)).abs() > 1e-4


def test_every_frame_and_expansion_token_sees_every_frame(tiny):
    frames = torch.randint(0, 256, (1, 6, 3, 64, 64), dtype=torch.uint8)
    changed = frames.clone()
    changed[0, 5] = 0
    (F, V), (F_, V_) = tiny.encode_video(frames), tiny.encode_video(changed)
    assert torch.equal(F[0, :5], F_[0, :5])
    assert ((V - V_).abs().amax(-1) > 1e-5).all()


def test_one_frame_and_no_expansion_are_enough():
    model = VideoColBERT(Config(backbone="tiny", num_frames=4, visual_expansion=0, temporal_layers=5))
    F, V = model.encode_video(torch.zeros(2, 1, 3, 64, 64, dtype=torch.uint8))
    assert F.shape == V.shape == (2, 1, 64)


@pytest.mark.parametrize("frames", [torch.zeros(1, 6, 3, 64, 64), torch.zeros(1, 7, 3, 64, 64, dtype=torch.uint8),
                                    torch.zeros(1, 6, 3, 32, 32, dtype=torch.uint8), torch.zeros(6, 3, 64, 64, dtype=torch.uint8)])
def test_frames_of_a_wrong_kind_are_refused_in_one_line(tiny, frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 \(B, 1 to 6, 3, 64, 64\), not "):
        tiny.encode_video(frames)


def test_load_gives_back_what_was_saved_bit_for_bit_without_pickle(tmp_path, tiny):
    config = Config(backbone="tiny", num_frames=3, visual_expansion=1, query_augmentation=False, pad_token=31, learn_scale=True)
    model = VideoColBERT(config).eval()
    model.logit_scale.data.fill_(1.25)
    model.save(tmp_path / "new" / "folder")
    again = VideoColBERT.load(tmp_path / "new" / "folder")
    assert again.config == config and not again.training
    frames = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    for m in (model, again):
        m.out = (*m.tokenize(["a dog"]), m.encode_query(*m.tokenize(["a dog"])), *m.encode_video(frames), m.logit_scale)
    assert all(torch.equal(a, b) for a, b in zip(model.out, again.out))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    safetensors.torch.load_file(tmp_path / "new" / "folder" / "model.safetensors")


@pytest.mark.parametrize("spoil", [lambda f: (f / "config.json").unlink(), lambda f: (f / "config.json").write_text("{"),
                                   lambda f: (f / "config.json").write_text('{"nonsense": 1}'),
                                   lambda f: (f / "model.safetensors").write_bytes(b"x" * 100),
                                   lambda f: (f / "config.json").write_text('{"backbone": "tiny", "num_frames": 9}')])
def test_a_folder_that_holds_no_model_is_named_in_one_line(tmp_path, tiny, spoil):
    tiny.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path.name} does not hold a model: ") as error:
        VideoColBERT.load(tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Frames of a file. Test clips show frame k as grey 6 k + 8, so that a frame is known by its brightness.

def write_clip(path, count=20, size=(48, 32), codec="libx264", times=None, picture=None, rate=10, **options):
    """A clip of `count` frames, frame k shown from times[k] / rate seconds on."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "7"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for k in range(count):
            pixels = np.full((size[1], size[0], 3), 6 * k + 8, np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = k if times is None else times[k]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shown(path, num_frames, size=16):
    frames = sample_frames(path, num_frames, size)
    assert frames.dtype == torch.uint8 and frames.shape == (num_frames, 3, size, size)
    return [round((x.float().mean().item() - 8) / 6) for x in frames]


@pytest.mark.parametrize("count, num_frames", [(20, 4), (20, 12), (20, 20), (7, 3), (3, 12), (1, 5), (20, 1)])
def test_sample_frames_takes_the_middle_of_equal_segments(tmp_path, count, num_frames):
    want = [int((i + 0.5) * count / num_frames) for i in range(num_frames)]
    assert shown(write_clip(tmp_path / "a.mp4", count), num_frames) == want


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mpg", "mpeg1video"), ("a.ts", "libx264"),
                                         ("a.h264", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mov", "mpeg4"), ("a.3gp", "mpeg4")])
def test_sample_frames_needs_no_frame_count_and_knows_the_containers_of_the_datasets(tmp_path, name, codec):
    path = write_clip(tmp_path / name, codec=codec, rate=25)
    assert shown(path, 5) == [2, 6, 10, 14, 18]


def test_sample_frames_samples_a_variable_frame_rate_in_time(tmp_path):
    """Frame 2 is on screen from 2 to 12 of 20 tenths of a second, so it is seen by the segments that fall there."""
    times = [0, 1, 2, 12, 13, 14, 15, 16, 17, 18, 19]
    assert shown(write_clip(tmp_path / "a.mkv", 11, times=times), 10) == [1, 2, 2, 2, 2, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("degrees, corner", [(0, (0, 0)), (90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_sample_frames_turns_the_frames_as_the_file_says(tmp_path, degrees, corner):
    """A white top left corner lands where a player, turning clockwise by the flag, shows it."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = 255
    data = write_clip(tmp_path / "a.mp4", 3, (64, 64), picture=picture).read_bytes()
    matrix = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    at = data.index(b"tkhd") + 4 + 40                                       # version 0: the matrix is 40 bytes in
    values = [matrix[0] << 16, matrix[1] << 16, 0, matrix[2] << 16, matrix[3] << 16, 0, 0, 0, 1 << 30]
    (tmp_path / "b.mp4").write_bytes(data[:at] + b"".join(v.to_bytes(4, "big", signed=True) for v in values) + data[at + 36:])
    quarters = sample_frames(tmp_path / "b.mp4", 1, 64)[0].float().mean(0).view(2, 32, 2, 32).mean((1, 3))
    assert divmod(quarters.argmax().item(), 2) == corner


@pytest.mark.parametrize("size", [(98, 34), (33, 65), (176, 144), (2, 2)])
def test_sample_frames_takes_odd_sizes_without_keeping_the_aspect_ratio(tmp_path, size):
    codec = "libx264" if size[0] % 2 == 0 else "ffv1"
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    picture[:, size[0] // 2:, 0] = 255                                      # right half red
    path = write_clip(tmp_path / "a.mkv", 4, size, codec, picture=picture)
    left, right = sample_frames(path, 2, 32).float().mean(0).unflatten(-1, (2, 16)).mean((1, 3)).T
    if size != (2, 2):                                                      # chroma is halved, two pixels have one colour
        assert right[0] > 150 and left[0] < 60 and right[1:].max() < 60


@pytest.mark.parametrize("make, message", [
    (lambda p: p.write_bytes(b""), "Invalid data"),
    (lambda p: p.write_text("hello"), "Invalid data"),
    (lambda p: p.mkdir(), "Is a directory|directory"),
    (lambda p: None, "No such file"),
    (lambda p: p.symlink_to("nowhere"), "No such file"),
    (lambda p: write_sound(p), "no video stream"),
    (lambda p: p.write_bytes(write_clip(p.with_name("b.mp4")).read_bytes()[:300]), "Invalid data|no frames|moov"),
])
def test_a_file_without_frames_is_named_in_one_line(tmp_path, make, message):
    make(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=rf"a\.mp4: .*({message})") as error:
        sample_frames(tmp_path / "a.mp4", 4, 16)
    assert "\n" not in str(error.value)


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

def test_retrieval_metrics_equal_a_sort_of_every_row():
    """Several queries a video, no ties: the rank is the place in the sorted row."""
    sim, target = torch.randn(60, 25), torch.randint(0, 25, (60,))
    ranks = [sorted(range(25), key=lambda b: -sim[a, b]).index(target[a]) + 1 for a in range(60)]
    got = retrieval_metrics(sim, target)
    for k in (1, 5, 10):
        assert got[f"R@{k}"] == pytest.approx(100 * sum(r <= k for r in ranks) / 60)
    assert got["nDCG@10"] == pytest.approx(sum(1 / math.log2(1 + r) for r in ranks if r <= 10) / 60)
    assert got["MdR"] == pytest.approx(np.median(ranks)) and got["MnR"] == pytest.approx(np.mean(ranks))


def test_a_tie_counts_against_the_model():
    constant = retrieval_metrics(torch.ones(8, 8), torch.arange(8))
    assert constant == {"R@1": 0, "R@5": 0, "R@10": 100, "nDCG@10": pytest.approx(1 / math.log2(9)), "MdR": 8, "MnR": 8}
    assert retrieval_metrics([[0.5, 0.5, 0.1]], [0])["MnR"] == 2
    assert retrieval_metrics([[0.5, 0.4, 0.1]], [0])["R@1"] == 100


@pytest.mark.parametrize("sim, target, message", [([[1.0, float("nan")]], [0], "NaN"), (torch.zeros(0, 3), [], "no queries")])
def test_metrics_of_nothing_and_of_nan_are_refused(sim, target, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(sim, target)


# ---------------------------------------------------------------------------------------------------------------------
# Figure 4

def test_interactions_are_each_words_similarity_to_each_frame(tiny):
    """A word of several tokens has their mean, start, end and pads have no place, expansion tokens are no frames."""
    frames = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    words, before, after = interactions(tiny, "a doggedly  small dog", frames)
    ids, mask = tiny.tokenize(["a doggedly small dog"])
    Q, (F, V) = tiny.encode_query(ids, mask)[0], tiny.encode_video(frames[None])
    assert words == ["a", "doggedly", "small", "dog"] and len(tiny.tokenizer.encode("doggedly")) == 2
    tokens = torch.stack([Q[1], (Q[2] + Q[3]) / 2, Q[4], Q[5]])
    assert (before - tokens @ F[0].T).abs().max() < 1e-6 and (after - tokens @ V[0, :6].T).abs().max() < 1e-6


def test_a_query_that_was_cut_keeps_its_first_words_in_the_figure(tiny):
    words, before, _ = interactions(tiny, "dog " * 50, torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    assert words == ["dog"] * 30 and before.shape == (30, 3)


def test_the_figure_puts_each_word_over_and_under_the_frame_it_picks():
    """Green ink above the frame picked before, red ink below the frame picked after."""
    frames = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    image = np.asarray(draw_interactions([("", ["dog"], frames, torch.eye(4)[1:2], torch.eye(4)[3:4])])).astype(int)
    strip = image[:, 70:]                                                   # right of the margin
    green = np.argwhere((strip[..., 1] > strip[..., 0] + 60) & (strip[..., 1] > strip[..., 2] + 60))
    red = np.argwhere((strip[..., 0] > strip[..., 1] + 100) & (strip[..., 0] > strip[..., 2] + 100))
    assert set(green[:, 1] // 96) == {1} and set(red[:, 1] // 96) == {3} and green[:, 0].max() < red[:, 0].min()


# ---------------------------------------------------------------------------------------------------------------------
# train.py: settings, data, cache

@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_an_epoch_has_every_caption_once_in_a_new_order(k):
    videos = [("a", list("abc")), ("b", ["d"]), ("c", list("efghi"))]
    s = train.Settings(captions_per_video=k, seed=3)
    items = train.epoch_items(videos, s, 0)
    assert sorted((v, c) for v, chosen in items for c in chosen) == [(v, c) for v in range(3) for c in range(len(videos[v][1]))]
    assert max(len(chosen) for _, chosen in items) == min(k, 5)
    assert items == train.epoch_items(videos, s, 0) != train.epoch_items(videos, s, 1)


def test_every_setting_is_an_option_with_its_sentence(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in train.dataclasses.fields(train.Settings):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "frames a video (section 5.2, Table 7) [12]" in text


def test_what_is_typed_beats_the_presets_and_these_beat_the_paper():
    s = train.parse_settings([])
    assert (s.backbone, s.freeze, s.learn_scale) == ("tiny", False, True)
    s = train.parse_settings(["--data", "msrvtt"])
    assert (s.backbone, s.num_frames, s.num_tokens, s.freeze, s.lr, s.lr_pretrained) == ("ViT-B-32-quickgelu", 12, 32, True, 1e-4, 1e-7)
    s = train.parse_settings(["--data", "msrvtt", "--backbone", "tiny", "--freeze", "--num-frames", "3", "--pretrained", "none"])
    assert (s.freeze, s.num_frames, s.learn_scale, s.pretrained) == (True, 3, True, None)


def test_the_schedule_rises_for_a_tenth_and_falls_to_the_end():
    factors = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1 and factors[99] == pytest.approx(1 / 90)
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)


def test_a_batch_marks_every_true_pair():
    """The same video twice, and a video with the very same caption; several captions a video make more rows than columns."""
    videos = [("0.mp4", ["a", "b"]), ("1.mp4", ["c", "d"]), ("2.mp4", ["c", "e"])]
    pairs = train.positive_pairs(videos, [(0, [0]), (1, [0]), (0, [1]), (2, [0])])
    assert pairs.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert train.positive_pairs(videos, [(0, [0, 1]), (2, [1])]).int().tolist() == [[1, 0], [1, 0], [0, 1]]


CAPTIONS = {f"video{i}": [f"caption {j} of {i}" for j in range(3)] for i in range(6)}


def write_msrvtt(root, shape, videos, train_csv=True, clips=6):
    """A small dataset in one of the layouts of the wild, test videos 1 and 4."""
    sentences = [(video, text, i) for i, (video, text) in enumerate((v, t) for v in CAPTIONS for t in CAPTIONS[v])]
    write = {"clip4clip": ["MSRVTT_data.json"], "official": ["train_val_videodatainfo.json", "test_videodatainfo.json"],
             "frozen": ["annotation/MSR_VTT.json"]}[shape]
    for k, name in enumerate(write):
        part = sentences[k::len(write)]
        data = {"annotations": [{"image_id": v, "caption": t, "id": i} for v, t, i in part]} if shape == "frozen" else {
            "info": {}, "videos": [{"video_id": v, "split": "train"} for v in CAPTIONS],
            "sentences": [{"caption": t, "video_id": v, "sen_id": i} for v, t, i in part]}
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(data))
    if train_csv:
        (root / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo2\nvideo3\n")
    (root / "MSRVTT_JSFUSION_test.csv").write_text(
        'key,vid_key,video_id,sentence\nret0,msr1,video1,"the query, of 1"\nret1,msr4,video4,the query of 4\n')
    (root / videos).mkdir(parents=True)
    for i in range(clips):
        write_clip(root / videos / f"video{i}.mp4", 4)
    return root


@pytest.mark.parametrize("shape", ["clip4clip", "official", "frozen"])
@pytest.mark.parametrize("videos", ["videos/all", "videos", "MSRVTT_Videos", "MSRVTT/videos/all"])
def test_msrvtt_is_read_in_every_layout(tmp_path, shape, videos):
    root = write_msrvtt(tmp_path, shape, videos)
    train_split, test_split = train.load_msrvtt(root)
    assert [(str(path.relative_to(root)), sorted(c)) for path, c in train_split] == [
        (f"{videos}/video{i}.mp4", CAPTIONS[f"video{i}"]) for i in (0, 2, 3)]
    assert test_split == [(root / videos / "video1.mp4", ["the query, of 1"]), (root / videos / "video4.mp4", ["the query of 4"])]


def test_without_the_9k_list_all_that_is_not_tested_is_trained_on(tmp_path):
    train_split, _ = train.load_msrvtt(write_msrvtt(tmp_path, "clip4clip", "videos", train_csv=False))
    assert [path.stem for path, _ in train_split] == ["video0", "video2", "video3", "video5"]


@pytest.mark.parametrize("spoil, message", [
    (lambda r: (r / "MSRVTT_data.json").unlink(), "no MSRVTT_data.json, .*: unpack https://.*msrvtt_data.zip"),
    (lambda r: (r / "MSRVTT_JSFUSION_test.csv").unlink(), "no MSRVTT_JSFUSION_test.csv .*: unpack https://.*msrvtt_data.zip"),
    (lambda r: [f.unlink() for f in (r / "videos").iterdir()], "no videos in .*: unpack https://.*MSRVTT.zip"),
    (lambda r: (r / "MSRVTT_data.json").write_text('{"sentences": ['), "MSRVTT_data.json: .*line 1"),
    (lambda r: (r / "MSRVTT_data.json").write_text('{}'), "MSRVTT_data.json: no 'annotations'"),
    (lambda r: (r / "MSRVTT_train.9k.csv").write_text("id\nvideo0\n"), "MSRVTT_train.9k.csv: no 'video_id'"),
    (lambda r: (r / "MSRVTT_train.9k.csv").write_text("video_id\nvideo77\n"), "no captions for 1 videos of .*, video77 first"),
])
def test_what_is_missing_from_msrvtt_is_named_in_one_line(tmp_path, spoil, message):
    root = write_msrvtt(tmp_path, "clip4clip", "videos")
    spoil(root)
    with pytest.raises(ValueError, match=message) as error:
        train.load_msrvtt(root)
    assert "\n" not in str(error.value)


def test_no_folder_at_all_says_where_to_get_one(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere: unpack https://.*MSRVTT.zip and https://.* into it, or give --root"):
        train.load_msrvtt(tmp_path / "nowhere")


def decodes(monkeypatch):
    """A list that grows by a path whenever a file is decoded."""
    calls = []
    monkeypatch.setattr(train, "sample_frames", lambda *args: calls.append(str(args[0])) or sample_frames(*args))
    return calls


def test_the_cache_decodes_once_and_gives_the_same_frames(tmp_path, monkeypatch):
    path, calls = write_clip(tmp_path / "a.mp4"), decodes(monkeypatch)
    first, second = (train.cached_frames(path, 4, 16, tmp_path / "cache") for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first, sample_frames(path, 4, 16)) and len(calls) == 1
    train.cached_frames(path, 5, 16, tmp_path / "cache"), train.cached_frames(path, 4, 24, tmp_path / "cache")
    assert len(calls) == 3
    assert train.cached_frames(path, 4, 16, tmp_path / "cache").shape == (4, 3, 16, 16) and len(calls) == 3


@pytest.mark.parametrize("at", ["header", "first", "last", "cut", "empty", "longer"])
def test_a_damaged_cache_is_noticed_and_rebuilt(tmp_path, monkeypatch, at):
    path, calls = write_clip(tmp_path / "a.mp4"), decodes(monkeypatch)
    frames = train.cached_frames(path, 4, 16, tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("*.frames")
    good = file.read_bytes()
    start = good.index(b"\n") + 1
    flip = {"header": 5, "first": start, "last": len(good) - 1}.get(at)
    file.write_bytes({"cut": good[:-7], "empty": b"", "longer": good + b"x"}.get(at) if flip is None else
                     good[:flip] + bytes([good[flip] ^ 1]) + good[flip + 1:])
    assert torch.equal(train.cached_frames(path, 4, 16, tmp_path / "cache"), frames) and len(calls) == 2
    assert file.read_bytes() == good


def test_a_replaced_video_is_decoded_anew_even_with_its_old_size_and_time(tmp_path, monkeypatch):
    path, other = write_clip(tmp_path / "a.mp4", 20), write_clip(tmp_path / "b.mp4", 10)
    assert not torch.equal(before := train.cached_frames(path, 4, 16, tmp_path / "cache"), sample_frames(other, 4, 16))
    size, stat = max(path.stat().st_size, other.stat().st_size), path.stat()
    content = other.read_bytes()
    path.write_bytes(content + bytes(max(0, stat.st_size - len(content))))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and path.stat().st_size == size
    after = train.cached_frames(path, 4, 16, tmp_path / "cache")
    assert torch.equal(after, sample_frames(path, 4, 16)) and not torch.equal(after, before)


def test_a_killed_build_of_the_cache_goes_on_to_the_same_bytes(tmp_path, shapes):
    def build(cache):
        code = ("import sys, train; s = train.parse_settings(['--root', sys.argv[1], '--cache', sys.argv[2], '--workers', '2']); "
                "train.load_data(s, 64)")
        return subprocess.Popen([sys.executable, "-c", code, str(shapes), str(cache)], stderr=subprocess.DEVNULL,
                                cwd=Path(train.__file__).parent, start_new_session=True)
    frames = lambda cache: {f.relative_to(cache): f.read_bytes() for f in cache.rglob("*.frames")}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = build(killed)
    while not killed.exists() or len(frames(killed)) < 20:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = frames(killed)
    assert build(whole).wait() == 0 and 20 <= len(before) < len(frames(whole))
    assert build(killed).wait() == 0 and frames(killed) == frames(whole)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded data

@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    train.write_shapes(root, galleries=1)
    return root


def test_every_test_caption_of_the_embedded_data_tells_one_video(shapes):
    """240 test videos, one query each, half on appearance and half on motion, all distinct and true of one video alone."""
    train_split, test_split = train.load_msrvtt(shapes)
    sentences = {}
    for s in json.loads((shapes / "MSRVTT_data.json").read_text())["sentences"]:
        sentences.setdefault(s["video_id"], []).append(s["caption"])
    queries = [query for _, (query,) in test_split]
    assert len(test_split) == len(set(queries)) == 240 and all(path.exists() for path, _ in test_split)
    assert [train.shapes_kind(q) for q in queries].count("motion") == 120
    for path, (query,) in test_split:
        assert [v.stem for v, _ in test_split if query in sentences[v.stem]] == [path.stem]
    opposite = {m: next(o for o, v in train.MOTIONS.items() if v == (k, -sign)) for m, (k, sign) in train.MOTIONS.items()}
    said = {tuple(sentences[path.stem])[1] for path, _ in test_split}
    assert all(text.replace(m, opposite[m]) in said for text in said for m in opposite if text.endswith(m))
    tested = {tuple(sentences[path.stem]) for path, _ in test_split}
    assert not tested & {tuple(captions) for _, captions in train_split}


@pytest.mark.parametrize("motion, opposite", [("moves left", "moves right"), ("grows", "shrinks"), ("turns left", "turns right"),
                                              ("appears before a ball", "appears after a ball")])
def test_opposite_motions_show_the_same_frames_in_opposite_order(tmp_path, motion, opposite):
    """So that no set of frames tells them apart: any advantage is the temporal level's."""
    for name, m in (("a.mp4", motion), ("b.mp4", opposite)):
        train.draw_clip(tmp_path / name, "red", "bar", "blue", m, np.random.default_rng(3))
    a, b = (sample_frames(tmp_path / name, 8, 64).float() for name in ("a.mp4", "b.mp4"))
    assert (a - b.flip(0)).abs().mean() < 2 and (a - b).abs().mean() > 5


# ---------------------------------------------------------------------------------------------------------------------
# End to end

def run(*argv):
    return subprocess.run([sys.executable, train.__file__, *map(str, argv)], capture_output=True, text=True)


SMALL = ["--data", "msrvtt", "--backbone", "tiny", "--num-frames", 3, "--num-tokens", 12, "--batch-size", 4, "--epochs", 2, "--workers", 0]


def test_a_run_leaves_its_folder_and_a_table_and_repeats_exactly(tmp_path):
    root = write_msrvtt(tmp_path / "data", "clip4clip", "videos")
    results = [run(*SMALL, "--root", root, "--cache", tmp_path / "cache", "--out", tmp_path / name) for name in "ab"]
    assert [r.returncode for r in results] == [0, 0], results[0].stderr
    a, b = tmp_path / "a", tmp_path / "b"
    assert sorted(p.name for p in a.iterdir()) == ["config.json", "interactions.png", "log.jsonl", "model.safetensors", "settings.json"]
    *steps, last = map(json.loads, (a / "log.jsonl").read_text().splitlines())
    assert [s["step"] for s in steps] == [0, 1, 2, 3] and {"loss", "MMS_F", "MMS_V", "lr"} <= steps[0].keys()
    assert [row["score"] for row in last["evaluation"]] == ["MMS_F", "MMS_V", "MMS_FV"] and last["gallery"] == 2
    assert all(f"{row['score']}" in results[0].stdout for row in last["evaluation"]) and "gallery of 2 videos" in results[0].stdout
    for name in ("model.safetensors", "log.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert VideoColBERT.load(a).config.num_frames == 3
    again = run(*SMALL, "--root", root, "--out", a)
    assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith("train.py: --out") and "Traceback" not in again.stderr


def test_two_processes_end_with_the_parameters_of_one(tmp_path):
    """The same global batch, with two captions of some videos and one of others, in one process and shared by two."""
    root = write_msrvtt(tmp_path / "data", "clip4clip", "videos")
    flags = [*SMALL, "--captions-per-video", 2, "--root", root, "--cache", tmp_path / "cache", "--device", "cpu"]
    assert run(*flags, "--out", tmp_path / "one").returncode == 0
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", train.__file__,
                          *map(str, flags), "--out", str(tmp_path / "two")], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    one, two = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    start = VideoColBERT.load(tmp_path / "one")                             # and they did move
    torch.manual_seed(0)
    moved = VideoColBERT(start.config).state_dict()
    assert max((one[name] - moved[name]).abs().max().item() for name in one) > 1e-3
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [s["loss"] for s in logs[0][:-1]] == pytest.approx([s["loss"] for s in logs[1][:-1]], rel=1e-4)
    assert logs[0][-1]["gallery"] == logs[1][-1]["gallery"] == 2 and len(logs[0]) == len(logs[1])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_a_list_taken_apart_in_order(world, monkeypatch):
    monkeypatch.setattr(train, "WORLD", world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(train, "RANK", rank)
        parts.append(train.share(list(range(11))))
    assert sum(parts, []) == list(range(11)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_benchmark_measures_every_part_without_weights():
    result = run("--bench", "--backbone", "tiny", "--root", "nowhere", "--batch-size", 2, "--num-frames", 2)
    assert result.returncode == 0, result.stderr
    for part in ("mean_max_sim", "decode", "cache", "image encoder", "temporal layers", "text encoder", "loss", "optimiser",
                 "whole step", "pairs/s", "TFLOP/s", "MB", "MMS_F ", "MMS_V ", "MMS_FV", "JPEG"):
        assert part in result.stdout, part


def test_a_missing_test_video_stops_the_evaluation_unless_allowed(tmp_path):
    root = write_msrvtt(tmp_path / "data", "clip4clip", "videos")
    (root / "videos/video4.mp4").write_bytes(b"")
    flags = [*SMALL, "--root", root, "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    stopped = run(*flags)
    assert stopped.returncode == 2 and "1 of 2 test videos cannot be read" in stopped.stderr and "video4.mp4" in stopped.stderr
    assert "Traceback" not in stopped.stderr and not (tmp_path / "out").exists()
    allowed = run(*flags, "--allow-missing")
    assert allowed.returncode == 0 and "gallery of 1 videos, 1 test videos missing" in allowed.stdout
    (root / "videos/video0.mp4").unlink()
    stopped = run(*flags[:-1], tmp_path / "other", "--allow-missing")
    assert stopped.returncode == 2 and "1 of 3 training videos cannot be read" in stopped.stderr and "video0.mp4" in stopped.stdout


@pytest.mark.parametrize("flags, message", [(["--batch-size", "400"], "--batch-size 400 is more than the 9 examples"),
                                            (["--device", "tpu9"], "--device tpu9"), (["--data", "nonsense"], "--data must be"),
                                            (["--loss", "hinge"], "loss must be"), (["--backbone", "ViT-B-23"], "unknown backbone")])
def test_a_wrong_flag_is_one_line(tmp_path, flags, message):
    """Raised to the last lines of train.py, which print it and leave with code 2 (seen in the test of a run's folder)."""
    root = write_msrvtt(tmp_path / "data", "clip4clip", "videos")
    with pytest.raises(ValueError, match=message) as error:
        train.main([*map(str, SMALL), "--root", str(root), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), *flags])
    assert "\n" not in str(error.value)


def test_a_few_videos_are_learned_by_heart(tmp_path, shapes):
    """The whole road, from H.264 to R@1: among 16 videos it trained on, nearly every query finds its own."""
    train_split, _ = train.load_msrvtt(shapes)
    videos = [(path, [captions[i % 2]]) for i, (path, captions) in enumerate(train_split[:16])]
    s = train.parse_settings(["--num-frames", "3", "--num-tokens", "12", "--epochs", "200", "--batch-size", "16", "--cache", str(tmp_path)])
    torch.manual_seed(0)
    model = VideoColBERT(Config(**{f.name: getattr(s, f.name) for f in train.dataclasses.fields(Config)}))
    losses = []
    train.train(model, videos, s, torch.device("cpu"), lambda loss, **_: losses.append(loss))
    sims, target, _ = train.evaluate(model, videos, s, torch.device("cpu"))
    assert retrieval_metrics(sims["MMS_FV"], target)["R@1"] >= 90 and losses[-1] < losses[0] / 4
