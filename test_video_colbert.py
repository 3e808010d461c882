"""Each test states the claim it checks. No GPU, network, weights or dataset is needed."""
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

import train
import video_colbert
from video_colbert import (
    Config, InputError, VideoColBERT, info_nce_loss, mean_max_sim, mms_fv,
    reciprocal_rank_fusion, retrieval_metrics, sample_frames, sigmoid_loss, video_to_text)

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
        tokens = [q.double() for q, counts in zip(Q[a], mask[a]) if counts]
        out[a, b] = sum(max(float(q @ v.double()) for v in V[b]) for q in tokens) / len(tokens)
    return out

@pytest.mark.parametrize("A, B, M, N", [(5, 7, 6, 4), (1, 1, 1, 1), (4, 3, 1, 5), (3, 4, 5, 1),
                                        (2, 3, 64, 66), (0, 3, 2, 2), (3, 0, 2, 2)])
def test_mean_max_sim_equals_a_float64_loop(A, B, M, N):
    Q, V, mask = unit(A, M, 16), unit(B, N, 16), torch.rand(A, M) < 0.6
    mask[:, 0] = True
    for weights in (mask, None):
        sim = mean_max_sim(Q, V, weights)
        want = loop(Q, V, torch.ones(A, M) if weights is None else weights)
        assert sim.shape == (A, B) and ((sim.double() - want).abs() < 1e-6).all()

def test_mean_max_sim_lets_query_tokens_choose_frames_and_never_the_reverse():
    Q, V = unit(2, 3, 8), unit(2, 4, 8)
    with_unchosen_frame = torch.cat([V, -Q[:, :1]], dim=1)
    assert torch.allclose(mean_max_sim(Q, V)[0, 0], mean_max_sim(Q, with_unchosen_frame)[0, 0])
    assert not torch.allclose(mean_max_sim(Q[:, :2], V), mean_max_sim(Q, V))

def test_masked_tokens_have_no_influence():
    Q, V, mask = unit(5, 6, 16), unit(7, 4, 16), torch.rand(5, 6) < 0.6
    mask[:, 0] = True
    junk = torch.where(mask[..., None], Q, 1000 * torch.randn(5, 6, 16))
    assert torch.allclose(mean_max_sim(junk, V, mask), mean_max_sim(Q, V, mask), atol=1e-6)

def test_mean_max_sim_has_the_gradients_of_finite_differences():
    Q, V = unit(3, 4, 5, dtype=torch.float64), unit(2, 6, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    assert torch.autograd.gradcheck(mean_max_sim, (Q.requires_grad_(), V.requires_grad_(), mask))

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

def test_sigmoid_loss_equals_equation_6_for_any_positives_and_several_captions_per_video():
    sim, positives = torch.rand(6, 3, dtype=torch.float64) * 2 - 1, torch.rand(6, 3) < 0.3
    logit = math.exp(2.5) * sim - 3.0
    probability = 1 / (1 + torch.exp(torch.where(positives, -logit, logit)))
    want = -probability.log().sum() / 6  # queries
    assert abs(sigmoid_loss(sim, positives, 2.5, -3.0) - want) < 1e-9

def test_trap_1_logit_scale_is_a_logarithm():
    """A pair with cosine 1 is classified as true, which a raw t = 4.77 could never do."""
    assert sigmoid_loss(torch.ones(1, 1)) < 1e-6
    assert -logsigmoid(torch.tensor(4.77 - 12.93)) > 8

def test_trap_2_the_bias_is_added():
    """If all similarities are 0, a negative costs nearly nothing and a positive about 12.93."""
    assert abs(sigmoid_loss(torch.zeros(4, 4)).item() - 12.93) < 1e-3

def test_trap_3_scale_and_bias_are_fixed_unless_asked_for(tiny):
    assert (tiny.logit_scale.item(), tiny.logit_bias.item()) == pytest.approx((4.77, -12.93))
    learned = VideoColBERT(Config(backbone="tiny", learn_scale=True))
    for model, trained in ((tiny, False), (learned, True)):
        assert model.logit_scale.requires_grad == model.logit_bias.requires_grad == trained

def test_trap_4_all_vectors_are_of_unit_length_and_others_are_refused(tiny, monkeypatch):
    ids, mask = tiny.tokenize(["a", "two words"])
    vectors = tiny.encode_query(ids, mask), *tiny.encode_video(pixels(2, 6))  # Q, F, V
    for x, shape in zip(vectors, ((2, 32, 64), (2, 6, 64), (2, 8, 64))):
        assert x.shape == shape and x.dtype == torch.float32
        assert (x.norm(dim=-1) - 1).abs().max() < 1e-6
    for i in range(3):
        monkeypatch.setattr(tiny, "norms_checked", False)
        Q, F, V = (1.1 * x if x is vectors[i] else x for x in vectors)
        with pytest.raises(AssertionError, match="unit length"):
            tiny.similarities(Q, mask, F, V)

def test_the_loss_of_random_vectors_is_what_the_size_of_their_cosines_predicts(tiny):
    """A cosine has deviation 1 / sqrt(d), the best of 12 is 1.63 deviations above 0."""
    Q, F, V, mask = unit(32, 32, 512), unit(32, 12, 512), unit(32, 12, 512), torch.ones(32, 32)
    logit = torch.tensor(math.exp(4.77) * 1.63 / math.sqrt(512) - 12.93)  # -4.4
    want = softplus(-logit) + 31 * softplus(logit)  # one positive, 31 negatives
    loss = tiny.compute_loss(Q, mask.bool(), F, V)[0]
    assert loss.item() == pytest.approx(2 * want.item(), rel=0.05)  # two levels

@pytest.mark.parametrize("loss", [sigmoid_loss, info_nce_loss])
def test_more_queries_than_videos_have_no_default_positives(loss):
    with pytest.raises(AssertionError, match="6 queries and 3 videos .*pass positives"):
        loss(torch.rand(6, 3))

def four_videos(**settings):
    """Four videos with two captions each -> model, settings and what a step needs of them."""
    torch.manual_seed(0)
    s = train.Settings(backbone="tiny", num_frames=2, num_tokens=8, learn_scale=True, **settings)
    model = VideoColBERT(s)
    ids, mask = model.tokenize([f"caption {i}" for i in range(8)])
    positives = torch.eye(4, dtype=torch.bool).repeat_interleave(2, dim=0)  # (8, 4)
    return model, s, ids, mask, pixels(4, 2), positives

def step(model, s, *batch):
    """A training step -> its numbers, and how far it moves the parameters: with SGD and a
    learning rate of 1 this is the gradient, clipped to norm 1."""
    before = parameters_to_vector(model.parameters()).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(enabled=False)
    numbers = train.training_step(model, optimizer, scaler, s, *batch)
    return numbers, parameters_to_vector(model.parameters()).detach() - before

def assert_same_step(got, want):
    for x, y in zip(got, want):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-6)

def test_positives_reach_the_loss_and_the_log():
    model, s, *batch = four_videos()
    positives = batch[-1]
    loss, sim_F, sim_V = model(*batch)
    want = sigmoid_loss(sim_F, positives) + sigmoid_loss(sim_V, positives)
    means = torch.stack([want, sim_F[positives].mean(), sim_V[positives].mean()])
    numbers, gradient = step(model, s, *batch)
    assert torch.allclose(loss, want) and torch.allclose(numbers[:3], means, atol=1e-5)
    assert numbers[3] > 1 and gradient.norm().item() == pytest.approx(1, abs=1e-3)

@pytest.mark.parametrize("micro_batch, calls", [(0, 1), (3, 4), (1, 8)])
def test_micro_batches_change_nothing_but_the_memory(micro_batch, calls):
    """They encode each part twice."""
    want = step(*four_videos())
    model, *others = four_videos(micro_batch=micro_batch)
    model.encode_video = Mock(wraps=model.encode_video)
    assert_same_step(step(model, *others), want)
    assert model.encode_video.call_count == calls

def step_of_process(rank, folder):
    """The step of one of two processes, each of which has a half of the batch."""
    train.RANK, train.WORLD = rank, 2
    dist.init_process_group("gloo", f"file://{folder}/shared", timedelta(minutes=2), 2, rank)
    model, s, *inputs, positives = four_videos()
    half = [x.chunk(2)[rank] for x in inputs]
    torch.save(step(model, s, *half, positives), f"{folder}/{rank}.pt")
    dist.destroy_process_group()

def test_two_processes_make_the_step_of_one(tmp_path, monkeypatch):
    """This process and another."""
    want = step(*four_videos())
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "WORLD", 2)
    other = torch.multiprocessing.spawn(step_of_process, [tmp_path], join=False)  # has rank 0
    step_of_process(1, tmp_path)
    other.join()
    for rank in range(2):
        assert_same_step(torch.load(tmp_path / f"{rank}.pt"), want)

@pytest.mark.parametrize("B", [1, 2, 17])
def test_info_nce_equals_open_clips_clip_loss_whatever_the_bias(B):
    image, text = unit(B, 8), unit(B, 8)
    want = ClipLoss()(image, text, 50.0)
    assert (info_nce_loss(image @ text.T, None, math.log(50.0), -3.0) - want).abs() < 1e-5

def test_info_nce_is_symmetric_and_shares_a_target_among_positives():
    sim, positives, costs = torch.rand(5, 5), torch.eye(5, dtype=torch.bool), []
    positives[0, 3] = positives[3, 0] = True
    assert abs(info_nce_loss(sim, positives) - info_nce_loss(sim.T, positives.T)) < 1e-6
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
    total, sim_F, sim_V = model(ids, mask, pixels(3, 2))
    single = {"sigmoid": sigmoid_loss, "infonce": info_nce_loss}[loss]
    want = single(sim_F + sim_V, logit_scale=4.77)
    if form == "dual":
        want = 0.5 * single(sim_F, logit_scale=4.77) + 2.0 * single(sim_V, logit_scale=4.77)
    assert abs(total - want) < 1e-5
    total.backward()

def test_a_new_loss_needs_one_entry_in_the_table(monkeypatch):
    def margin_loss(sim, positives, logit_scale, logit_bias):
        return (sim.diag()[:, None] - sim).relu().mean()
    monkeypatch.setitem(video_colbert.LOSSES, "margin", margin_loss)
    model = VideoColBERT(Config(backbone="tiny", num_frames=2, loss="margin"))
    total, sim_F, sim_V = model(*model.tokenize(["one", "two"]), pixels(2, 2))
    assert total == margin_loss(sim_F, None, 0, 0) + margin_loss(sim_V, None, 0, 0)

# ---- Encoders, against open_clip's own
@pytest.fixture(scope="module",
                params=["ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-B-16-SigLIP"])
def real(request):
    """Each of the paper's backbones with random weights and, to save time, fewer layers."""
    torch.manual_seed(0)
    config = open_clip.get_model_config(request.param)
    config["text_cfg"]["layers"], config["vision_cfg"]["layers"] = 5, 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_model_config", lambda name: config)
        patch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
        return VideoColBERT(Config(backbone=request.param, pretrained=None, num_frames=2))

def test_one_token_of_q_is_open_clips_text_embedding(real):
    """CLIP's end token, SigLIP's last; 32 tokens of CLIP give what its own 77 give."""
    if real.is_siglip:
        ids = theirs = torch.randint(2, 32000, (2, 64))
        mask, end = torch.ones(2, 64, dtype=torch.bool), 63
    else:
        theirs = open_clip.get_tokenizer(real.config.backbone)(["a man feeds a dog", "x"])
        ids, mask = real.tokenize(["a man feeds a dog", "x"])  # (2, 32)
        end = real.real_tokens(ids).sum(1) - 1
    with torch.no_grad():
        got = real.encode_query(ids, mask)[range(2), end]
        assert (got - real.backbone.encode_text(theirs, normalize=True)).abs().max() < 1e-5

def test_f_is_open_clips_image_embedding(real):
    frames = pixels(1, 2, size=224)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    if real.is_siglip:
        mean = std = (0.5,) * 3
    mean, std = torch.tensor([mean, std]).view(2, 3, 1, 1)
    with torch.no_grad():
        F, V = real.encode_video(frames)
        want = real.backbone.encode_image((frames[0] / 255 - mean) / std, normalize=True)
    assert (F[0] - want).abs().max() < 1e-5
    assert V.shape == (1, 4, F.shape[-1]) and F.shape[-1] == (768 if real.is_siglip else 512)

def test_parameters_are_frozen_and_grouped_as_in_the_paper_and_a_step_moves_just_the_others(real):
    """Section 5.2: positions, patch and token embeddings are frozen; 1e-7 for pre-trained
    parameters, 1e-4 for new ones. Biases and norms do not decay."""
    frozen = {name for name, p in real.named_parameters() if not p.requires_grad}
    names = ["visual.positional_embedding", "visual.conv1.weight"]
    if real.is_siglip:
        patches = "visual.trunk.patch_embed.proj"
        names = ["visual.trunk.pos_embed", f"{patches}.weight", f"{patches}.bias"]
    names += ["text.positional_embedding", "text.token_embedding.weight"]
    assert frozen == {f"backbone.{name}" for name in names} | {"logit_scale", "logit_bias"}
    optimizer = train.make_optimizer(real, train.Settings())
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in real.named_parameters() if name not in frozen}
    assert group_of.keys() == set(trained.values())
    for name, p in trained.items():
        group = group_of[p]
        assert group["peak_lr"] == (1e-7 if name.startswith("backbone.") else 1e-4), name
        assert group["weight_decay"] == (0.01 if p.ndim > 1 else 0), name
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6
        group["lr"] = 0.1  # large, so that a step is seen
    before = {name: p.detach().clone() for name, p in real.named_parameters()}
    ids = torch.randint(2, 32000, (1, real.num_tokens))
    real(ids, torch.ones_like(ids, dtype=torch.bool), pixels(1, 1, size=224))[0].backward()
    optimizer.step()
    unmoved = {name for name, p in real.named_parameters() if torch.equal(p, before[name])}
    real.load_state_dict({**real.state_dict(), **before})
    assert unmoved == frozen

def test_the_temporal_transformer_starts_as_the_text_encoders_first_layers(real):
    assert len(real.temporal.blocks) == 4
    for block, theirs in zip(real.temporal.blocks, real.backbone.text.transformer.resblocks):
        for p, q in zip(block.parameters(), theirs.parameters()):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()

def test_mean_pooling_is_equation_1():
    """cos(q, mean_n f_n) with open_clip's own pooled query, on F and V without expansion."""
    model = VideoColBERT(Config(backbone="tiny", num_frames=3, interaction="mp"))
    ids, mask = model.tokenize(["a dog", "a small dog runs"])
    assert mask.int().argmax(1).tolist() == [3, 5] and mask.sum() == 2
    theirs = open_clip.get_tokenizer("ViT-B-32")(["a dog", "a small dog runs"])
    with torch.no_grad():
        F, V = model.encode_video(pixels(3, 3))
        got = model.similarities(model.encode_query(ids, mask), mask, F, V)
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
    model = VideoColBERT(Config(backbone="tiny", num_frames=3, query_augmentation=False)).eval()
    (F, _), queries = model.encode_video(pixels(4, 3)), ["a dog", "a small dog runs"]
    ids, mask = model.tokenize(queries)
    assert mask.sum(1).tolist() == [4, 6]
    want = mean_max_sim(model.encode_query(ids, mask), F, mask)
    model.config.pad_token, model.num_tokens = 3002, 20
    ids, mask = model.tokenize(queries)
    Q = model.encode_query(ids, mask)
    assert (Q[~mask] == 0).all() and (ids[~mask] == 3002).all()
    assert (mean_max_sim(Q, F, mask) - want).abs().max() < 1e-6
    model.config.query_augmentation = True
    ids, mask = model.tokenize(queries)
    augmented = mean_max_sim(model.encode_query(ids, mask), F, mask)
    assert mask.all() and (augmented - want).abs().max() > 1e-3

# ---- Video side
def test_f_sees_one_frame_and_v_all_of_its_video_in_their_order(tiny):
    frames = pixels(2, 6)
    changed = frames.clone()
    changed[0, 5] = 0
    (F, V), (F2, V2) = tiny.encode_video(frames), tiny.encode_video(changed)
    assert torch.equal(F[0, :5], F2[0, :5]) and ((V - V2)[0].abs().amax(-1) > 1e-5).all()
    assert torch.equal(F[1], F2[1]) and torch.equal(V[1], V2[1])
    F2, V2 = tiny.encode_video(frames.flip(1))
    Q = tiny.encode_query(*tiny.tokenize(["a dog"]))
    assert (F - F2.flip(1)).abs().max() < 1e-5
    assert (mean_max_sim(Q, F) - mean_max_sim(Q, F2)).abs().max() < 1e-6
    assert (mean_max_sim(Q, V) - mean_max_sim(Q, V2)).abs().min() > 1e-4

def test_a_residual_leads_around_the_temporal_layers_whose_shape_is_checked(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tiny.temporal, "forward", lambda f: f)
        with pytest.raises(AssertionError, match=r"temporal: \(2, 6, 64\), not \(2, 8, 64\)"):
            tiny.encode_video(pixels(2, 6))
    monkeypatch.setattr(tiny.temporal, "blocks", torch.nn.ModuleList())
    f, positions, expansion = torch.randn(2, 6, 64), *tiny.temporal.parameters()
    assert torch.allclose(tiny.temporal(f)[:, :6], 2 * f + positions)
    assert torch.allclose(tiny.temporal(f)[:, 6:], 2 * expansion) and expansion.std() > 0

def test_all_tensors_stay_on_the_device_of_the_model(monkeypatch):
    """On the meta device, where a tensor has no values; it has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    with torch.device("meta"):
        model = VideoColBERT(Config(backbone="tiny", num_frames=3))
    monkeypatch.setattr(model, "norms_checked", True)
    ids, mask = model.tokenize(["a dog", "a cat"])
    results = model(ids.to("meta"), mask.to("meta"), pixels(2, 3).to("meta"))
    assert [x.device.type for x in results] == ["meta"] * 3

@pytest.mark.parametrize("frames", [
    pixels(1, 6).float(), pixels(1, 7), pixels(1, 6)[..., :32], pixels(6)])
def test_frames_of_a_wrong_kind_are_refused(tiny, frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 \(B, 1 to 6, 3, 48, 48\), not "):
        tiny.encode_video(frames)

# ---- Metrics (section 5.3)
def test_retrieval_metrics_equal_a_sort_of_every_row():
    sim, target = torch.randn(60, 25), torch.randint(0, 25, (60,))
    ranks = [sorted(range(25), key=lambda b: -row[b]).index(t) + 1 for row, t in zip(sim, target)]
    got = retrieval_metrics(sim, target)
    for k in (1, 5, 10):
        assert got[f"R@{k}"] == pytest.approx(100 * sum(r <= k for r in ranks) / 60)
    gains = [1 / math.log2(1 + r) if r <= 10 else 0 for r in ranks]
    assert got["nDCG@10"] == pytest.approx(np.mean(gains))
    assert (got["MdR"], got["MnR"]) == pytest.approx((np.median(ranks), np.mean(ranks)))

def test_a_tie_counts_against_the_model():
    got = retrieval_metrics(torch.ones(8, 8), torch.arange(8))
    want = {"R@1": 0, "R@5": 0, "R@10": 100, "nDCG@10": 1 / math.log2(9), "MdR": 8, "MnR": 8}
    assert {name: got[name] for name in want} == pytest.approx(want)
    assert [retrieval_metrics([[0.5, x, 0.1]], [0])["MnR"] for x in (0.5, 0.4)] == [2, 1]

def test_video_to_text_ranks_a_videos_best_caption_among_the_other_videos_best():
    """Several captions per video, some videos with none, and ties."""
    sim, target, ranks = (torch.randn(60, 15) * 4).round(), torch.randint(0, 13, (60,)), []
    videos = sorted(set(target.tolist()))
    for v in videos:
        best = {w: sim[target == w, v].max().item() for w in videos}
        ranks.append(sum(x >= best[v] for x in best.values()))
    metrics = retrieval_metrics(video_to_text(sim, target), range(len(videos)))
    assert len(set(ranks)) > 3 and metrics["MnR"] == pytest.approx(np.mean(ranks))
    assert metrics["R@1"] == pytest.approx(100 * ranks.count(1) / len(videos))

def test_reciprocal_rank_fusion_is_its_formula_also_with_ties():
    F, V = (torch.randn(2, 9, 12) * 2).round()
    rank_F, rank_V = ((x[:, None] >= x[:, :, None]).sum(2).double() for x in (F, V))
    want = 1 / (60 + rank_F) + 1 / (60 + rank_V)
    assert (reciprocal_rank_fusion(F, V) - want).abs().max() < 1e-12

# ---- Frames of a video file. Frame k of a test clip has brightness 6 k + 8.
def write_clip(path, count=20, size=(48, 32), codec="libx264", times=None, picture=None, rate=10):
    """A clip of `count` frames; frame k is shown from times[k] / rate seconds on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "7"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for k in range(count):
            grey = np.full((size[1], size[0], 3), 6 * k + 8, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey if picture is None else picture, "rgb24")
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
    assert frame_numbers(path, 5, 1.0) == frame_numbers(path, 5, 1.0, 30.0) == [11, 13, 15, 17, 19]
    with pytest.raises(InputError, match=r"a\.mp4: no .*frames between .*2\.0 and "):
        sample_frames(path, 5, 16, 2.0)

# ---- train.py: clips and batches
SMALL = ["--backbone", "tiny", "--num-frames", "3", "--num-tokens", "12", "--batch-size", "4",
         "--epochs", "2", "--device", "cpu"]

def write_json_lines(folder, splits="train train train test val test"):
    lines = []
    for i, split in enumerate(splits.split()):
        write_clip(folder / f"{i}/clip.mp4", 4 + i % 30)  # all with one file name
        captions = [f"caption {j} of {i}" for j in range(3 if split == "train" else 1)]
        lines.append({"video": f"{i}/clip.mp4", "captions": captions, "split": split})
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))

@pytest.fixture
def data(tmp_path, monkeypatch):
    """Three clips to train on, with three captions each, one to validate and two to test."""
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path)
    return tmp_path

def test_json_lines_become_clips(tmp_path):
    lines = [{"video": "a b.mp4", "captions": ["one", "שלום 🐕"], "split": "train"},
             {"video": "/x/b.mkv", "captions": ["two"], "split": "test", "start": 2, "end": 4.5},
             {"video": "a b.mp4", "captions": ["c"], "split": "train", "start": 1.0}]
    text = "\ufeff" + "\r\n\n".join(map(json.dumps, lines))
    (tmp_path / "my.jsonl").write_text(text, "utf-8")
    path, Clip = f"{tmp_path}/a b.mp4", train.Clip
    assert train.load_clips(train.Settings(data=f"{tmp_path}/my.jsonl")) == {
        "train": [Clip(path, ["one", "שלום 🐕"], 0.0, None), Clip(path, ["c"], 1.0, None)],
        "val": [], "test": [Clip("/x/b.mkv", ["two"], 2, 4.5)]}

@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_an_epoch_has_every_caption_in_its_own_order_and_k_captions_per_example(k):
    """Each caption is there once; where k does not divide their number, some are repeated."""
    clips = [train.Clip("a", list("abc")), train.Clip("b", ["d"]), train.Clip("c", list("efghi"))]
    s = train.Settings(captions_per_video=k, seed=3, epochs=2, batch_size=2)
    first, second = train.epoch_examples(clips, s, 0), train.epoch_examples(clips, s, 1)
    for v, n in enumerate((3, 1, 5)):
        rows = [chosen for w, chosen in first if w == v]
        times = [sum(rows, []).count(c) for c in range(n)]
        assert [len(row) for row in rows] == [k] * math.ceil(n / k)
        assert min(times) >= 1 >= max(times) - min(times)
    in_order = sorted(first, key=lambda example: example[0])
    assert train.epoch_examples(clips, s, 0) == first not in (second, in_order)
    n = len(first) // 2 * 2
    assert list(itertools.chain(*train.batches(clips, s))) == first[:n] + second[:n]

def test_a_batch_marks_every_true_pair():
    """The same video twice, and a video with the very same caption as another."""
    clips = [train.Clip("0", ["a", "b"]), train.Clip("1", ["c", "d"]), train.Clip("2", ["c", "e"])]
    pairs = train.positive_pairs(clips, [(0, [0]), (1, [0]), (0, [1]), (2, [0])])
    assert pairs.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    pairs = train.positive_pairs(clips, [(0, [0, 1]), (2, [1])])  # of two captions and of one
    assert pairs.int().tolist() == [[1, 0], [1, 0], [0, 1]]

def test_the_schedule_rises_for_a_tenth_and_falls_to_the_end():
    factors = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:] == pytest.approx([(100 - step) / 90 for step in range(10, 100)])

# ---- train.py: runs, and the models that they save
def test_a_few_clips_are_overfitted_from_file_to_recall(tmp_path):
    """12 clips of one colour each. In 30 steps the loss falls from 14 to 1.6. It stays above 5
    with a raw t, a subtracted bias or shifted positives; without normalization MMS exceeds 1."""
    clips = []
    for i in range(12):
        color = np.full((32, 48, 3), [85 * (i % 4), 127 * (i // 4), 60], np.uint8)
        path = write_clip(tmp_path / f"{i}.mp4", 6, picture=color)
        clips.append(train.Clip(str(path), [f"color {'abcdefghijkl'[i]}"]))
    flags = "--num-frames 2 --num-tokens 8 --epochs 30 --captions-per-video 1 --batch-size 12"
    s = train.parse_settings([*flags.split(), "--cache", f"{tmp_path}/cache"])
    model = VideoColBERT(s)
    train.train(model, {"train": clips, "val": [], "test": []}, s, model.device, tmp_path, "")
    log = records(tmp_path)
    assert log[-1]["loss"] < 4 < 10 < log[0]["loss"]
    assert all(max(line["MMS_F"], line["MMS_V"]) <= 1 for line in log)
    sim_F, sim_V, target = train.evaluate(model, clips, s, model.device)
    assert retrieval_metrics(mms_fv(sim_F, sim_V), target)["R@1"] >= 90

def records(out):
    return [json.loads(line) for line in open(f"{out}/log.jsonl")]

def test_a_run_leaves_its_folder_and_a_table_and_repeats_exactly(data, capsys):
    """With other threads and an empty cache, too."""
    flags = [*SMALL, "--data", "clips.jsonl", "--eval-every", "2"]
    train.main([*flags, "--out", "a"])
    train.main([*flags, "--out", "b", "--workers", "1", "--cache", "cache2"])
    assert contents("a") == contents("b") and VideoColBERT.load("a").config.num_frames == 3
    assert set(os.listdir("a")) == {"settings.json", "config.json", *contents("a")}
    *log, last = records("a")
    kinds = [line.get("split", "step") for line in log]
    assert kinds == ["step", "step", "val", "step", "step", "val", "test"]
    assert last["gallery"] == 2 and len(last["evaluation"]) == 8
    assert train.results_table(last) in capsys.readouterr().out
    with pytest.raises(InputError, match="a exists: give a new --out, or --resume a"):
        train.main([*flags, "--out", "a"])

def test_evaluation_gives_the_models_device_a_few_clips_and_queries_at_a_time(monkeypatch):
    model = Mock(image_size=64, tokenize=lambda texts: torch.zeros(2, len(texts), 4))
    model.encode_video.side_effect = lambda frames: (unit(len(frames), 2, 8),) * 2
    model.encode_query.side_effect = lambda ids, mask: unit(len(ids), 4, 8)
    model.similarities.side_effect = lambda Q, mask, F, V: (torch.zeros(len(Q), len(F)),) * 2
    monkeypatch.setattr(train, "load_frames", lambda clips, s, size: pixels(len(clips), 2))
    monkeypatch.setattr(train, "autocast", lambda *args: contextlib.nullcontext())
    clips, s = [train.Clip("a", ["one", "two"])] * 5, train.Settings(micro_batch=2)
    sim, _, target = train.evaluate(model, clips, s, torch.device("meta"))  # for a GPU
    assert model.eval.called and sim.shape == (10, 5) and target[::2].tolist() == [*range(5)]
    for encode, sizes in ((model.encode_video, [2, 2, 1]), (model.encode_query, [2] * 5)):
        assert [len(call.args[0]) for call in encode.call_args_list] == sizes
        inputs = [x for call in encode.call_args_list for x in call.args]
        assert {x.device.type for x in inputs} == {"meta"}

def test_load_gives_back_what_was_saved_bit_for_bit_without_pickle(tmp_path):
    """One frame, no expansion, more layers than the text encoder; a setting that is new."""
    config = Config(backbone="tiny", visual_expansion=0, temporal_layers=5, pad_token=31,
                    query_augmentation=False, learn_scale=True)
    model, frames, folder = VideoColBERT(config).eval(), pixels(2, 1), tmp_path / "new/folder"
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
    return {x: open(f"{out}/{x}", "rb").read() for x in ("log.jsonl", "model.safetensors")}

def run_until(monkeypatch, flags, function, call):
    """Run until a function of train.py is called for the call-th time, as if killed there."""
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
    places = ("training_step", 1, "1"), ("save_checkpoint", 1, "500"), ("result_rows", 0, "500")
    for function, call, every in places:
        out = ["--out", function, "--checkpoint-every", every]
        run_until(monkeypatch, [*flags, *out], function, call)
        os.rename(function, f"moved-{function}")
        train.main(["--resume", f"moved-{function}", "--workers", "2", "--cache", "cache2"])
        assert contents(f"moved-{function}") == contents("whole")
