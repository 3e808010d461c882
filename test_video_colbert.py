"""Each test states a claim and checks it. They need no GPU, network, weights or data."""
import contextlib
import itertools
import json
import math
import os
from datetime import timedelta
from fractions import Fraction
from functools import partial
from unittest.mock import Mock

import av
import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss, SigLipLoss
from torch.nn.functional import logsigmoid, normalize, softplus
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

import train
import video_colbert
from video_colbert import (
    Config, InputError, VideoColBERT, info_nce_loss, mean_max_sim, mms_fv,
    reciprocal_rank_fusion, retrieval_metrics, sample_frames, sigmoid_loss,
    video_to_text)

torch.set_num_threads(1)  # fastest for tiny models: several threads fight for the cores

def unit(*shape, dtype=torch.float32):
    return normalize(torch.randn(*shape, dtype=dtype), dim=-1)

def pixels(*shape, size=48):
    return torch.randint(0, 256, (*shape, 3, size, size), dtype=torch.uint8)

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return VideoColBERT(Config(backbone="tiny", num_frames=6)).eval()

# ---- MeanMaxSim (equations 3 and 4)
def loop(Q, V, mask):
    """Equation 3, written out, in float64."""
    out = torch.zeros(len(Q), len(V), dtype=torch.float64)
    for a, b in itertools.product(range(len(Q)), range(len(V))):
        best = []
        for q in Q[a, mask[a].bool()]:
            best.append(max(float(q.double() @ v.double()) for v in V[b]))
        out[a, b] = sum(best) / len(best)
    return out

@pytest.mark.parametrize("A, B, M, N", [
    (5, 7, 6, 4), (1, 1, 1, 1), (4, 3, 1, 5), (3, 4, 5, 1), (2, 3, 64, 66), (0, 3, 2, 2),
    (3, 0, 2, 2)])
def test_mean_max_sim_equals_a_float64_loop(A, B, M, N):
    Q, V, mask = unit(A, M, 16), unit(B, N, 16), torch.rand(A, M) < 0.6
    mask[:, 0] = True
    for weights in (mask, None):
        sim = mean_max_sim(Q, V, weights)
        want = loop(Q, V, torch.ones(A, M) if weights is None else weights)
        assert sim.shape == (A, B) and ((sim.double() - want).abs() < 1e-6).all()

def test_mean_max_sim_lets_query_tokens_choose_frames_and_never_the_reverse():
    Q, V = unit(2, 3, 8), unit(2, 4, 8)
    sim = mean_max_sim(Q, V)
    with_unchosen_frame = torch.cat([V, -Q[:, :1]], dim=1)
    assert torch.allclose(mean_max_sim(Q, with_unchosen_frame)[0, 0], sim[0, 0])
    assert not torch.allclose(mean_max_sim(Q[:, :2], V), sim)

def test_masked_tokens_have_no_influence():
    Q, V, mask = unit(5, 6, 16), unit(7, 4, 16), torch.rand(5, 6) < 0.6
    mask[:, 0] = True
    junk = torch.where(mask[..., None], Q, 1000 * torch.randn(5, 6, 16))
    want = mean_max_sim(Q, V, mask)
    assert torch.allclose(mean_max_sim(junk, V, mask), want, atol=1e-6)

def test_mean_max_sim_has_the_gradients_of_finite_differences():
    Q, V = unit(3, 4, 5, dtype=torch.float64), unit(2, 6, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    inputs = Q.requires_grad_(), V.requires_grad_(), mask
    assert torch.autograd.gradcheck(mean_max_sim, inputs)

def test_mean_max_sim_stays_in_float32_under_autocast():
    Q, V = unit(4, 5, 16), unit(6, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        sim = mean_max_sim(Q, V)
    assert sim.dtype == torch.float32 and torch.equal(sim, mean_max_sim(Q, V))

# ---- Losses (equations 6 and 7) and the four traps of the paper
@pytest.mark.parametrize("B", [1, 2, 33])
def test_sigmoid_loss_equals_open_clips_siglip_loss(B):
    image, text = unit(B, 8, dtype=torch.float64), unit(B, 8, dtype=torch.float64)
    want = SigLipLoss()(image, text, math.exp(4.77), -12.93)
    assert (sigmoid_loss(image @ text.T) - want).abs() < 1e-6
    assert abs(sigmoid_loss((image @ text.T).float()) / want - 1) < 1e-6

def test_sigmoid_loss_equals_equation_6_for_any_positives_and_more_queries_than_videos():
    sim = torch.rand(6, 3, dtype=torch.float64) * 2 - 1
    positives = torch.rand(6, 3) < 0.3
    logit = math.exp(2.5) * sim - 3.0
    probability = 1 / (1 + torch.exp(torch.where(positives, -logit, logit)))
    want = -probability.log().sum() / 6  # queries
    assert abs(sigmoid_loss(sim, positives, 2.5, -3.0) - want) < 1e-9

def test_trap_1_logit_scale_is_a_logarithm():
    """A pair with cosine 1 counts as true, which a raw t = 4.77 could never achieve."""
    assert sigmoid_loss(torch.ones(1, 1)) < 1e-6
    assert -logsigmoid(torch.tensor(4.77 - 12.93)) > 8

def test_trap_2_the_bias_is_added():
    """At similarity 0 a negative costs nearly nothing, and a positive about 12.93."""
    assert abs(sigmoid_loss(torch.zeros(4, 4)).item() - 12.93) < 1e-3

def test_trap_3_scale_and_bias_are_fixed_unless_asked_for(tiny):
    assert tiny.logit_scale.item() == pytest.approx(4.77)
    assert tiny.logit_bias.item() == pytest.approx(-12.93)
    learned = VideoColBERT(Config(backbone="tiny", learn_scale=True))
    for model, is_learned in ((tiny, False), (learned, True)):
        assert model.logit_scale.requires_grad == is_learned
        assert model.logit_bias.requires_grad == is_learned

def test_trap_4_all_vectors_are_of_unit_length_and_others_are_refused(tiny, monkeypatch):
    ids, mask = tiny.tokenize(["a", "two words"])
    Q = tiny.encode_query(ids)
    F, V = tiny.encode_video(pixels(2, 6))
    for x, shape in ((Q, (2, 32, 64)), (F, (2, 6, 64)), (V, (2, 8, 64))):
        assert x.shape == shape and x.dtype == torch.float32
        assert (x.norm(dim=-1) - 1).abs().max() < 1e-6
    for q, f, v in ((1.1 * Q, F, V), (Q, 1.1 * F, V), (Q, F, 1.1 * V)):
        monkeypatch.setattr(tiny, "norms_checked", False)
        with pytest.raises(AssertionError, match="unit length"):
            tiny.similarities(q, mask, f, v)

def test_the_loss_of_random_vectors_is_what_the_size_of_their_cosines_predicts(tiny):
    """A cosine has deviation 1 / sqrt(d), the best of 12 is 1.63 deviations above 0."""
    Q, F, V = unit(32, 32, 512), unit(32, 12, 512), unit(32, 12, 512)
    mask = torch.ones(32, 32, dtype=torch.bool)
    logit = torch.tensor(math.exp(4.77) * 1.63 / math.sqrt(512) - 12.93)  # -4.4
    want = softplus(-logit) + 31 * softplus(logit)  # one positive, 31 negatives
    loss, _, _ = tiny.compute_loss(Q, mask, F, V)
    assert loss.item() == pytest.approx(2 * want.item(), rel=0.05)  # two levels

@pytest.mark.parametrize("loss", [sigmoid_loss, info_nce_loss])
def test_more_queries_than_videos_have_no_default_positives(loss):
    with pytest.raises(AssertionError, match="6 queries and 3 videos .*pass positives"):
        loss(torch.rand(6, 3))

def four_videos(**settings):
    """Four videos with two captions each -> all that `step` takes."""
    torch.manual_seed(0)
    s = train.Settings(backbone="tiny", num_frames=2, num_tokens=8, learn_scale=True,
                       **settings)
    model = VideoColBERT(s)
    ids, mask = model.tokenize([f"caption {i}" for i in range(8)])
    positives = torch.eye(4, dtype=torch.bool).repeat_interleave(2, dim=0)  # (8, 4)
    return model, s, ids, mask, pixels(4, 2), positives

def step(model, s, *batch):
    """A training step -> its numbers, and how far it moves the parameters: with SGD and
    learning rate 1 this is the gradient, clipped to norm 1."""
    before = parameters_to_vector(model.parameters()).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(enabled=False)
    numbers = train.training_step(model, optimizer, scaler, s, *batch)
    return numbers, parameters_to_vector(model.parameters()).detach() - before

def test_positives_reach_the_loss_and_the_log():
    model, s, *batch = four_videos()
    positives = batch[-1]
    loss, mms_f, mms_v = model(*batch)
    want = sigmoid_loss(mms_f, positives) + sigmoid_loss(mms_v, positives)
    means = torch.stack([want, mms_f[positives].mean(), mms_v[positives].mean()])
    numbers, gradient = step(model, s, *batch)
    assert torch.allclose(loss, want) and torch.allclose(numbers[:3], means, atol=1e-5)
    assert numbers[3] > 1 and gradient.norm().item() == pytest.approx(1, abs=1e-3)

@pytest.mark.parametrize("micro_batch, calls", [(0, 1), (3, 4), (1, 8)])
def test_micro_batches_change_nothing_but_the_memory(micro_batch, calls):
    """They encode each part twice."""
    want = step(*four_videos())
    model, *others = four_videos(micro_batch=micro_batch)
    model.encode_video = Mock(wraps=model.encode_video)
    assert_close(step(model, *others), want, rtol=1e-4, atol=1e-6)
    assert model.encode_video.call_count == calls

def step_of_process(rank, folder):
    """The step of one of two processes, each of which has a half of the batch."""
    train.RANK, train.WORLD = rank, 2
    file = f"file://{folder}/meeting-point"
    dist.init_process_group("gloo", file, timedelta(minutes=2), world_size=2, rank=rank)
    model, s, *inputs, positives = four_videos()
    half = [x.chunk(2)[rank] for x in inputs]
    torch.save(step(model, s, *half, positives), f"{folder}/{rank}.pt")
    dist.destroy_process_group()

def test_two_processes_make_the_step_of_one(tmp_path, monkeypatch):
    """This process has rank 1, and starts the one with rank 0."""
    want = step(*four_videos())
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "WORLD", 2)
    other = torch.multiprocessing.spawn(step_of_process, [tmp_path], join=False)
    step_of_process(1, tmp_path)
    other.join()
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert_close(got, want, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize("B", [1, 2, 17])
def test_info_nce_equals_open_clips_clip_loss_whatever_the_bias(B):
    image, text = unit(B, 8), unit(B, 8)
    want = ClipLoss()(image, text, 50.0)
    loss = info_nce_loss(image @ text.T, logit_scale=math.log(50.0), logit_bias=-3.0)
    assert (loss - want).abs() < 1e-5

def test_info_nce_is_symmetric_and_shares_a_target_among_positives():
    sim, positives = torch.rand(5, 5), torch.eye(5, dtype=torch.bool)
    positives[0, 3] = positives[3, 0] = True
    assert abs(info_nce_loss(sim, positives) - info_nce_loss(sim.T, positives.T)) < 1e-6
    costs = []
    for logits in (100 * sim.double(), 100 * sim.double().T):
        for row, true in zip(logits, positives):  # which are symmetric
            costs.append(-row.log_softmax(0)[true].mean())
    assert abs(info_nce_loss(sim, positives, math.log(100)) - sum(costs) / 10) < 1e-5

@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
@pytest.mark.parametrize("form", ["dual", "combined"])
def test_the_model_trains_with_the_loss_that_its_config_names(loss, form):
    model = VideoColBERT(Config(backbone="tiny", num_frames=2, loss=loss, loss_form=form,
                                lambda_frame=0.5, lambda_video=2.0))
    ids, mask = model.tokenize(["one", "two", "three"])
    total, mms_f, mms_v = model(ids, mask, pixels(3, 2))
    function = {"sigmoid": sigmoid_loss, "infonce": info_nce_loss}[loss]
    single = partial(function, logit_scale=4.77)
    want = single(mms_f + mms_v)
    if form == "dual":
        want = 0.5 * single(mms_f) + 2.0 * single(mms_v)
    assert abs(total - want) < 1e-5
    total.backward()

def test_a_new_loss_needs_one_entry_in_the_table(monkeypatch):
    def margin_loss(sim, positives, logit_scale, logit_bias):
        return (sim.diag()[:, None] - sim).relu().mean()
    monkeypatch.setitem(video_colbert.LOSSES, "margin", margin_loss)
    model = VideoColBERT(Config(backbone="tiny", num_frames=2, loss="margin"))
    total, mms_f, mms_v = model(*model.tokenize(["one", "two"]), pixels(2, 2))
    assert total == margin_loss(mms_f, None, 0, 0) + margin_loss(mms_v, None, 0, 0)

# ---- Encoders, against open_clip's own
@pytest.fixture(scope="module",
                params=["ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-B-16-SigLIP"])
def real(request):
    """A backbone of the paper with random weights and, to save time, fewer layers."""
    torch.manual_seed(0)
    small = open_clip.get_model_config(request.param)
    small["text_cfg"]["layers"] = 5
    small["vision_cfg"]["layers"] = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_model_config", lambda name: small)
        patch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
        config = Config(backbone=request.param, pretrained=None, num_frames=2)
        return VideoColBERT(config)

def test_one_token_of_q_is_open_clips_text_embedding(real):
    """CLIP's end token, SigLIP's last; 32 tokens of CLIP give what its own 77 give."""
    if real.is_siglip:
        ids = theirs = torch.randint(2, 32000, (2, 64))
        mask, end = torch.ones(2, 64, dtype=torch.bool), 63
    else:
        texts = ["a man feeds a dog", "x"]
        theirs = open_clip.get_tokenizer(real.config.backbone)(texts)  # (2, 77)
        ids, mask = real.tokenize(texts)  # (2, 32)
        end = real.real_tokens(ids).sum(1) - 1
    with torch.no_grad():
        got = real.encode_query(ids)[range(2), end]
        want = real.backbone.encode_text(theirs, normalize=True)
    assert (got - want).abs().max() < 1e-5

def test_f_is_open_clips_image_embedding(real):
    frames = pixels(1, 2, size=224)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    if real.is_siglip:
        mean = std = (0.5,) * 3
    mean, std = torch.tensor([mean, std]).view(2, 3, 1, 1)
    with torch.no_grad():
        F, V = real.encode_video(frames)
        want = real.backbone.encode_image((frames[0] / 255 - mean) / std, normalize=True)
    width = 768 if real.is_siglip else 512
    assert F.shape == (1, 2, width) and V.shape == (1, 4, width)
    assert (F[0] - want).abs().max() < 1e-5

def frozen_parameters(real):
    """Section 5.2: positions, patch and token embeddings. The loss's are fixed, too."""
    names = ["visual.positional_embedding", "visual.conv1.weight"]
    if real.is_siglip:
        patches = "visual.trunk.patch_embed.proj"
        names = ["visual.trunk.pos_embed", f"{patches}.weight", f"{patches}.bias"]
    names += ["text.positional_embedding", "text.token_embedding.weight"]
    return {f"backbone.{name}" for name in names} | {"logit_scale", "logit_bias"}

def test_parameters_are_frozen_and_grouped_as_in_the_paper(real):
    """1e-7 for pre-trained parameters, 1e-4 for new ones. Biases and norms don't decay."""
    optimizer = train.make_optimizer(real, train.Settings())
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    frozen = set()
    for name, p in real.named_parameters():
        assert p.requires_grad == (p in group_of), name
        if not p.requires_grad:
            frozen.add(name)
            continue
        group = group_of[p]
        assert group["peak_lr"] == (1e-7 if name.startswith("backbone.") else 1e-4), name
        assert group["weight_decay"] == (0.01 if p.ndim > 1 else 0), name
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6
    assert frozen == frozen_parameters(real)

def test_a_step_moves_all_parameters_but_the_frozen_ones(real):
    before = {name: p.detach().clone() for name, p in real.named_parameters()}
    optimizer = train.make_optimizer(real, train.Settings())
    for group in optimizer.param_groups:
        group["lr"] = 0.1  # large, so that every step is seen
    ids = torch.randint(2, 32000, (1, real.num_tokens))
    mask = torch.ones_like(ids, dtype=torch.bool)
    loss, _, _ = real(ids, mask, pixels(1, 1, size=224))
    loss.backward()
    optimizer.step()

    unmoved = set()
    for name, p in real.named_parameters():
        if torch.equal(p, before[name]):
            unmoved.add(name)
    real.load_state_dict({**real.state_dict(), **before})
    assert unmoved == frozen_parameters(real)

def test_the_temporal_transformer_starts_as_the_text_encoders_first_layers(real):
    assert len(real.temporal.blocks) == 4
    layers = real.backbone.text.transformer.resblocks
    for block, theirs in zip(real.temporal.blocks, layers):
        for p, q in zip(block.parameters(), theirs.parameters()):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()

def test_mean_pooling_is_equation_1():
    """cos(q, mean_n f_n) with open_clip's query, on F, and on V without expansion."""
    model = VideoColBERT(Config(backbone="tiny", num_frames=3, interaction="mp"))
    ids, mask = model.tokenize(["a dog", "a small dog runs"])
    assert mask.int().argmax(1).tolist() == [3, 5] and mask.sum() == 2
    theirs = open_clip.get_tokenizer("ViT-B-32")(["a dog", "a small dog runs"])
    with torch.no_grad():
        F, V = model.encode_video(pixels(3, 3))
        got = model.similarities(model.encode_query(ids), mask, F, V)
        q = model.backbone.encode_text(theirs, normalize=True)
    for sim, x in zip(got, (F, V[:, :3])):
        assert (sim - q @ normalize(x.mean(1), dim=-1).T).abs().max() < 1e-5

# ---- Query side
def test_clip_queries_are_start_words_end_and_pads(tiny):
    ids, mask = tiny.tokenize(["a dog !", "a!!!b", "", "dog " * 10_000])
    assert ids.dtype == torch.int64 and ids.shape == mask.shape == (4, 32) and mask.all()
    assert ids[0].tolist() == [49406, 320, 1929, 256, 49407] + [0] * 27
    assert ids[2].tolist() == [49406, 49407] + [0] * 30
    assert ids[3].tolist() == [49406] + [1929] * 30 + [49407]  # cut, with its end token

def test_without_query_augmentation_pads_count_for_nothing():
    """The score is that of the words alone, whatever the pad token and the length."""
    config = Config(backbone="tiny", num_frames=3, query_augmentation=False)
    model = VideoColBERT(config).eval()
    F, _ = model.encode_video(pixels(4, 3))
    queries = ["a dog", "a small dog runs"]
    ids, mask = model.tokenize(queries)
    assert mask.sum(1).tolist() == [4, 6]
    want = mean_max_sim(model.encode_query(ids), F, mask)

    model.config.pad_token, model.num_tokens = 3002, 20
    ids, mask = model.tokenize(queries)
    Q = model.encode_query(ids)
    assert (ids[~mask] == 3002).all()
    assert (mean_max_sim(Q, F, mask) - want).abs().max() < 1e-6

    model.config.query_augmentation = True
    ids, mask = model.tokenize(queries)
    augmented = mean_max_sim(model.encode_query(ids), F, mask)
    assert mask.all() and (augmented - want).abs().max() > 1e-3

# ---- Video side
def test_f_sees_one_frame_and_v_all_of_its_video_in_their_order(tiny):
    frames = pixels(2, 6)
    changed = frames.clone()
    changed[0, 5] = 0
    F, V = tiny.encode_video(frames)
    F2, V2 = tiny.encode_video(changed)
    assert torch.equal(F[0, :5], F2[0, :5]) and ((V - V2)[0].abs().amax(-1) > 1e-5).all()
    assert torch.equal(F[1], F2[1]) and torch.equal(V[1], V2[1])

    F2, V2 = tiny.encode_video(frames.flip(1))
    Q = tiny.encode_query(tiny.tokenize(["a dog"])[0])
    assert (F - F2.flip(1)).abs().max() < 1e-5
    assert (mean_max_sim(Q, F) - mean_max_sim(Q, F2)).abs().max() < 1e-6
    assert (mean_max_sim(Q, V) - mean_max_sim(Q, V2)).abs().min() > 1e-4

def test_a_temporal_module_without_expansion_tokens_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(tiny.temporal, "forward", lambda f: f)
    message = r"temporal: \(2, 6, 64\), not \(2, 8, 64\)"
    with pytest.raises(AssertionError, match=message):
        tiny.encode_video(pixels(2, 6))

def test_a_residual_leads_around_the_temporal_layers(tiny, monkeypatch):
    monkeypatch.setattr(tiny.temporal, "blocks", torch.nn.ModuleList())
    f, positions, expansion = torch.randn(2, 6, 64), *tiny.temporal.parameters()
    assert torch.allclose(tiny.temporal(f)[:, :6], 2 * f + positions)
    assert torch.allclose(tiny.temporal(f)[:, 6:], 2 * expansion) and expansion.std() > 0

def test_all_tensors_stay_on_the_device_of_the_model(monkeypatch):
    """On the meta device, where tensors have no values; there is no autocast for it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"):
        model = VideoColBERT(Config(backbone="tiny", num_frames=3))
    monkeypatch.setattr(model, "norms_checked", True)
    ids, mask = model.tokenize(["a dog", "a cat"])
    ids, mask = ids.to("meta"), mask.to("meta")
    results = [model.real_tokens(ids), *model(ids, mask, pixels(2, 3).to("meta"))]
    assert all(x.is_meta for x in results)

# ---- Metrics (section 5.3)
def test_retrieval_metrics_equal_a_sort_of_every_row():
    sim, target = torch.randn(60, 25), torch.randint(0, 25, (60,))
    ranks = []
    for row, true in zip(sim, target):
        ranks.append(row.argsort(descending=True).tolist().index(true) + 1)
    got = retrieval_metrics(sim, target)
    for k in (1, 5, 10):
        assert got[f"R@{k}"] == pytest.approx(100 * sum(r <= k for r in ranks) / 60)
    gains = [1 / math.log2(1 + r) if r <= 10 else 0 for r in ranks]
    assert got["nDCG@10"] == pytest.approx(np.mean(gains))
    assert (got["MdR"], got["MnR"]) == pytest.approx((np.median(ranks), np.mean(ranks)))

def test_a_tie_counts_against_the_model():
    got = retrieval_metrics(torch.ones(8, 8), torch.arange(8))
    want = {"R@1": 0, "R@5": 0, "R@10": 100, "MdR": 8, "MnR": 8,
            "nDCG@10": 1 / math.log2(9)}
    assert {name: got[name] for name in want} == pytest.approx(want)
    assert [retrieval_metrics([[0.5, x, 0.1]], [0])["MnR"] for x in (0.5, 0.4)] == [2, 1]

def test_video_to_text_ranks_a_videos_best_caption_among_the_other_videos_best():
    """Several captions per video, some videos with none, and ties."""
    sim, target = (torch.randn(60, 15) * 4).round(), torch.randint(0, 13, (60,))
    videos = sorted(set(target.tolist()))
    ranks = []
    for v in videos:
        best = {w: sim[target == w, v].max().item() for w in videos}
        ranks.append(sum(x >= best[v] for x in best.values()))
    metrics = retrieval_metrics(video_to_text(sim, target), range(len(videos)))
    assert len(set(ranks)) > 3 and metrics["MnR"] == pytest.approx(np.mean(ranks))
    assert metrics["R@1"] == pytest.approx(100 * ranks.count(1) / len(videos))

def test_reciprocal_rank_fusion_is_its_formula_also_with_ties():
    F, V = (torch.randn(2, 9, 12) * 2).round()
    want = 0
    for sim in (F, V):
        rank = (sim[:, None] >= sim[:, :, None]).sum(2).double()
        want = want + 1 / (60 + rank)
    assert (reciprocal_rank_fusion(F, V) - want).abs().max() < 1e-12

# ---- Frames of a video file. Frame k of a test clip has brightness 6 k + 8.
def write_clip(path, count=20, size=(48, 32), codec="libx264", times=None, picture=None,
               rate=10):
    """A clip of `count` frames; frame k is shown from times[k] / rate seconds on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "7"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for k in range(count):
            array = picture
            if picture is None:
                array = np.full((size[1], size[0], 3), 6 * k + 8, np.uint8)
            frame = av.VideoFrame.from_ndarray(array, "rgb24")
            frame.pts = k if times is None else times[k]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path

def frame_numbers(path, num_frames, *times):
    frames = sample_frames(path, num_frames, 16, *times)
    assert frames.dtype == torch.uint8 and frames.shape == (num_frames, 3, 16, 16)
    return [round((x.float().mean().item() - 8) / 6) for x in frames]

@pytest.mark.parametrize(
    "count, num_frames", [(20, 4), (20, 12), (20, 20), (7, 3), (3, 12), (1, 5), (20, 1)])
def test_sample_frames_takes_the_middle_of_equal_segments(tmp_path, count, num_frames):
    want = [int((i + 0.5) * count / num_frames) for i in range(num_frames)]
    assert frame_numbers(write_clip(tmp_path / "a.mp4", count), num_frames) == want

def test_sample_frames_takes_a_part_of_a_video(tmp_path):
    """20 frames at 10 a second; an end beyond the video is its end."""
    path = write_clip(tmp_path / "a.mp4")
    assert frame_numbers(path, 5, 0.0, 1.0) == [1, 3, 5, 7, 9]
    for span in ((1.0,), (1.0, 30.0)):
        assert frame_numbers(path, 5, *span) == [11, 13, 15, 17, 19]
    with pytest.raises(InputError, match=r"a\.mp4: cannot take .*frames between .*2\.0 and "):
        sample_frames(path, 5, 16, 2.0)

# ---- train.py: clips and batches
SMALL = ["--backbone", "tiny", "--num-frames", "3", "--num-tokens", "12",
         "--batch-size", "4", "--epochs", "2", "--device", "cpu"]

def write_json_lines(folder, splits="train train train test val test"):
    lines = []
    for i, split in enumerate(splits.split()):
        write_clip(folder / f"{i}/clip.mp4", 4 + i % 30)  # all with one file name
        captions = [f"caption {j} of {i}" for j in range(3 if split == "train" else 1)]
        lines.append({"video": f"{i}/clip.mp4", "captions": captions, "split": split})
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))

@pytest.fixture
def data(tmp_path, monkeypatch):
    """Three clips to train on, with three captions each, one to validate, two to test."""
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path)
    return tmp_path

@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_an_epoch_has_every_caption_in_its_own_order_and_k_captions_per_example(k):
    """Each caption is there once; if k does not divide their number, some come again."""
    clips = [train.Clip(captions, list(captions)) for captions in ("abc", "d", "efghi")]
    s = train.Settings(captions_per_video=k, seed=3, epochs=2, batch_size=2)
    first, second = train.epoch_examples(clips, s, 0), train.epoch_examples(clips, s, 1)
    for v, n in enumerate((3, 1, 5)):
        rows = [chosen for w, chosen in first if w == v]
        assert [len(row) for row in rows] == [k] * math.ceil(n / k)
        times = [sum(rows, []).count(c) for c in range(n)]
        assert min(times) >= 1 >= max(times) - min(times)

    in_order = sorted(first, key=lambda example: example[0])
    assert train.epoch_examples(clips, s, 0) == first
    assert first not in (second, in_order)
    n = len(first) // 2 * 2
    assert list(itertools.chain(*train.batches(clips, s))) == first[:n] + second[:n]

def test_a_batch_marks_every_true_pair():
    """The same video twice, and a video with the very same caption as another, drawn or not."""
    clips = [train.Clip(captions, list(captions)) for captions in ("ab", "cd", "ce")]
    pairs = train.positive_pairs(clips, [(0, [0]), (1, [0]), (0, [1]), (2, [0])])
    row_a, row_c = [1, 0, 1, 0], [0, 1, 0, 1]
    assert pairs.int().tolist() == [row_a, row_c, row_a, row_c]
    # An example with two captions and one with one.
    pairs = train.positive_pairs(clips, [(0, [0, 1]), (2, [1])])
    assert pairs.int().tolist() == [[1, 0], [1, 0], [0, 1]]
    assert train.positive_pairs(clips, [(1, [1]), (2, [0])]).int().tolist() == [[1, 0], [1, 1]]

def test_the_schedule_rises_for_a_tenth_and_falls_to_the_end():
    factors = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:] == pytest.approx([(100 - step) / 90 for step in range(10, 100)])

# ---- train.py: runs, and the models that they save
def test_a_few_clips_are_overfitted_from_file_to_recall(tmp_path):
    """12 clips of one colour each. In 30 steps the loss falls from 14 to 1.6. It stays
    above 5 with a raw t, a subtracted bias or shifted positives; without normalization
    MMS exceeds 1."""
    clips = []
    for i in range(12):
        color = np.full((32, 48, 3), [85 * (i % 4), 127 * (i // 4), 60], np.uint8)
        path = write_clip(tmp_path / f"{i}.mp4", 6, picture=color)
        clips.append(train.Clip(str(path), [f"color {'abcdefghijkl'[i]}"]))
    data = {"train": clips, "val": [], "test": []}
    flags = "--num-frames 2 --num-tokens 8 --captions-per-video 1 --batch-size 12".split()
    s = train.parse_settings([*flags, "--epochs", "30", "--cache", f"{tmp_path}/cache"])
    model = VideoColBERT(s)
    train.train(model, data, s, model.device, tmp_path, "")
    log = records(tmp_path)
    assert log[-1]["loss"] < 4 < 10 < log[0]["loss"]
    assert all(max(line["MMS_F"], line["MMS_V"]) <= 1 for line in log)
    mms_f, mms_v, target = train.evaluate(model, clips, s, model.device)
    assert retrieval_metrics(mms_fv(mms_f, mms_v), target)["R@1"] >= 90

def records(out):
    return [json.loads(line) for line in open(f"{out}/log.jsonl")]

def test_evaluation_gives_the_device_a_few_clips_and_queries_at_a_time(monkeypatch):
    """The meta device stands in for a GPU, and the model only notes what it gets."""
    model = Mock(image_size=64, tokenize=lambda texts: torch.zeros(2, len(texts), 4))
    model.encode_video.side_effect = lambda frames: (unit(len(frames), 2, 8),) * 2
    model.encode_query.side_effect = lambda ids: unit(len(ids), 4, 8)
    model.similarities.side_effect = lambda Q, mask, F, V: torch.zeros(2, len(Q), len(F))
    monkeypatch.setattr(train, "load_frames", lambda part, s, size: pixels(len(part), 2))
    monkeypatch.setattr(train, "autocast", lambda *args: contextlib.nullcontext())
    clips, s = [train.Clip("a", ["one", "two"])] * 5, train.Settings(micro_batch=2)
    sim, _, target = train.evaluate(model, clips, s, torch.device("meta"))
    assert sim.shape == (10, 5) and target[::2].tolist() == [0, 1, 2, 3, 4]
    assert model.eval.called

    for encode, sizes in (("encode_video", [2, 2, 1]), ("encode_query", [2] * 5)):
        calls = getattr(model, encode).call_args_list
        assert [len(call.args[0]) for call in calls] == sizes
        assert all(x.is_meta for call in calls for x in call.args)

def test_load_gives_back_what_was_saved_bit_for_bit_without_pickle(tmp_path):
    """Of one frame, without expansion, with more layers than the text encoder. A setting
    that is newer than the saved model has its default."""
    config = Config(backbone="tiny", visual_expansion=0, temporal_layers=5, pad_token=31,
                    query_augmentation=False, learn_scale=True)
    model, frames = VideoColBERT(config).eval(), pixels(2, 1)
    folder = tmp_path / "new/folder"
    model.logit_scale.data.fill_(1.25)
    model.save(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    again = VideoColBERT.load(folder)
    assert again.config == config and not again.training

    saved = [*model.state_dict().values(), *model.encode_video(frames)]
    loaded = [*again.state_dict().values(), *again.encode_video(frames)]
    assert all(map(torch.equal, saved, loaded)) and loaded[-1].shape == (2, 1, 64)

    file = folder / "config.json"
    file.write_text(file.read_text().replace('"query_augmentation": false,', ""))
    assert VideoColBERT.load(folder).config.query_augmentation

def contents(out):
    names = "log.jsonl", "model.safetensors"
    return {name: open(f"{out}/{name}", "rb").read() for name in names}

def run_until(monkeypatch, flags, function, call):
    """Run until train.py calls a function for the call-th time, as if killed there."""
    original, calls = getattr(train, function), itertools.count()
    def dies(*args):
        assert next(calls) != call, "killed"
        return original(*args)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="killed"):
        patch.setattr(train, function, dies)
        train.main(flags)

def test_a_killed_run_resumes_to_the_same_bytes(data, monkeypatch):
    flags = [*SMALL, "--data", "clips.jsonl"]
    train.main([*flags, "--out", "whole"])
    places = [("training_step", 1, "1"), ("save_checkpoint", 1, "500"),
              ("result_rows", 0, "500")]
    for function, call, every in places:
        out, moved = function, f"moved-{function}"
        options = ["--out", out, "--checkpoint-every", every]
        run_until(monkeypatch, [*flags, *options], function, call)
        os.rename(out, moved)
        train.main(["--resume", moved, "--workers", "2", "--cache", "cache2"])
        assert contents(moved) == contents("whole")
