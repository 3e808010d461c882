"""Each test states the claim it checks. No GPU, network, weights or dataset is needed."""
import itertools
import json
import math
import os
import subprocess
from fractions import Fraction

import av
import numpy as np
import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch.nn.functional import logsigmoid, normalize
from torch.utils._python_dispatch import TorchDispatchMode

import train
import video_colbert
from video_colbert import (Config, InputError, VideoColBERT, info_nce_loss, interactions,
                           mean_max_sim, mms_fv, retrieval_metrics, sample_frames, sigmoid_loss)

def unit(*shape, dtype=torch.float32):
    return normalize(torch.randn(*shape, dtype=dtype), dim=-1)

def pixels(*shape):
    return torch.randint(0, 256, (*shape, 3, 64, 64), dtype=torch.uint8)

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return VideoColBERT(Config(backbone="tiny", num_frames=6)).eval()

# ---- MeanMaxSim (equations 3 and 4) --------------------------------------------------------------
def loop(Q, V, mask):
    """Equation 3, written out, in float64."""
    out = torch.zeros(len(Q), len(V), dtype=torch.float64)
    for a, b in itertools.product(range(len(Q)), range(len(V))):
        tokens = [q.double() for q, counts in zip(Q[a], mask[a]) if counts]
        out[a, b] = sum(max(float(q @ v.double()) for v in V[b]) for q in tokens) / len(tokens)
    return out

@pytest.mark.parametrize("A, B, M, N", [(5, 7, 6, 4), (1, 1, 1, 1), (4, 3, 1, 5), (3, 4, 5, 1),
                                        (2, 3, 64, 66), (0, 3, 2, 2), (3, 0, 2, 2)])
@pytest.mark.parametrize("grad", [True, False])
def test_mean_max_sim_equals_a_float64_loop(A, B, M, N, grad):
    Q, V, mask = unit(A, M, 16), unit(B, N, 16), torch.rand(A, M) < 0.6
    mask[:, 0] = True
    with torch.set_grad_enabled(grad):
        masked, plain = mean_max_sim(Q, V, mask), mean_max_sim(Q, V)
    assert masked.shape == (A, B)
    assert ((masked.double() - loop(Q, V, mask)).abs() < 1e-6).all()
    assert ((plain.double() - loop(Q, V, torch.ones(A, M))).abs() < 1e-6).all()

def test_mean_max_sim_lets_query_tokens_choose_frames_and_never_the_reverse():
    Q, V = unit(2, 3, 8), unit(2, 4, 8)
    with_unchosen_frame = torch.cat([V, -Q[:, :1]], dim=1)
    assert torch.allclose(mean_max_sim(Q, V)[0, 0], mean_max_sim(Q, with_unchosen_frame)[0, 0])
    assert not torch.allclose(mean_max_sim(Q[:, :2], V), mean_max_sim(Q, V))

def naive(Q, V, mask):
    best = torch.einsum("amd,bnd->abmn", Q, V).max(-1).values             # (A, B, M)
    return (best * mask[:, None]).sum(-1) / mask.sum(-1)[:, None]

@pytest.mark.parametrize("B", [7, 1500])
def test_mean_max_sim_has_the_gradients_of_the_naive_form(B):
    Q, V = unit(9, 5, 16, dtype=torch.float64), unit(B, 6, 16, dtype=torch.float64)
    G, mask = torch.randn(9, B, dtype=torch.float64), torch.rand(9, 5) < 0.7
    mask[:, 0] = True
    grads = []
    for form in (mean_max_sim, naive):
        q, v = Q.clone().requires_grad_(), V.clone().requires_grad_()
        (form(q, v, mask) * G).sum().backward()
        grads.append((q.grad, v.grad))
    for got, want in zip(*grads):
        assert (got - want).abs().max() < 1e-10

class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in [out] if isinstance(x, torch.Tensor))])
        return out

def test_mean_max_sim_without_gradients_never_holds_all_similarities():
    """No tensor reaches a tenth of A x B x M x N."""
    with torch.no_grad(), Largest() as largest:
        mean_max_sim(unit(256, 32, 8), unit(2048, 14, 8))
    assert largest.numel < 256 * 2048 * 32 * 14 / 10

def test_mean_max_sim_stays_in_float32_under_autocast():
    Q, V = unit(4, 5, 16), unit(6, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        sim = mean_max_sim(Q, V)
    assert sim.dtype == torch.float32 and torch.equal(sim, mean_max_sim(Q, V))

# ---- Losses (equations 6 and 7) and the four traps of the paper ----------------------------------
@pytest.mark.parametrize("B", [1, 2, 33])
def test_sigmoid_loss_equals_open_clips_siglip_loss(B):
    image, text = unit(B, 8, dtype=torch.float64), unit(B, 8, dtype=torch.float64)
    want = SigLipLoss()(image, text, math.exp(4.77), -12.93)
    assert (sigmoid_loss(image @ text.T) - want).abs() < 1e-6
    assert abs(sigmoid_loss((image @ text.T).float()) / want - 1) < 1e-6

def test_sigmoid_loss_equals_equation_6_for_any_positives():
    sim = torch.rand(6, 6, dtype=torch.float64) * 2 - 1
    positives, want = torch.rand(6, 6) < 0.3, 0.0
    for i, j in itertools.product(range(6), range(6)):
        z = 1 if positives[i, j] else -1
        logit = z * (math.exp(2.5) * sim[i, j].item() - 3.0)
        want -= math.log(1 / (1 + math.exp(-logit))) / 6
    assert abs(sigmoid_loss(sim, positives, 2.5, -3.0).item() - want) < 1e-9

def test_trap_1_logit_scale_is_a_logarithm():
    """A pair with cosine 1 is classified as true, which a raw t = 4.77 could never do."""
    assert sigmoid_loss(torch.ones(1, 1)) < 1e-6
    assert -logsigmoid(torch.tensor(4.77 - 12.93)) > 8

def test_trap_2_the_bias_is_added():
    """If all similarities are 0, a negative costs nearly nothing and a positive about 12.93."""
    assert abs(sigmoid_loss(torch.zeros(4, 4)).item() - 12.93) < 1e-3

def test_trap_3_scale_and_bias_are_fixed_unless_asked_for(tiny):
    values = tiny.logit_scale.item(), tiny.logit_bias.item()
    assert values == (pytest.approx(4.77), pytest.approx(-12.93))
    learned = VideoColBERT(Config(backbone="tiny", learn_scale=True))
    for model, trained in ((tiny, False), (learned, True)):
        assert model.logit_scale.requires_grad == model.logit_bias.requires_grad == trained

def test_trap_4_all_vectors_are_of_unit_length(tiny):
    Q = tiny.encode_query(*tiny.tokenize(["a", "two words"]))
    F, V = tiny.encode_video(pixels(2, 6))
    for x, shape in ((Q, (2, 32, 64)), (F, (2, 6, 64)), (V, (2, 8, 64))):
        assert x.shape == shape and x.dtype == torch.float32
        assert (x.norm(dim=-1) - 1).abs().max() < 1e-6

def test_a_second_caption_of_a_video_is_a_positive():
    sim = torch.eye(3)
    sim[0, 1] = sim[1, 0] = 1.0
    assert sigmoid_loss(sim, sim.bool()) < 1e-4 < 50 < sigmoid_loss(sim)

def test_with_k_captions_per_video_the_loss_is_the_mean_of_its_rows():
    sim, positives = torch.rand(6, 3), torch.eye(3, dtype=torch.bool).repeat_interleave(2, 0)
    rows = [sigmoid_loss(sim[i:i + 1], positives[i:i + 1]) for i in range(6)]
    assert abs(sigmoid_loss(sim, positives) - torch.stack(rows).mean()) < 1e-4

@pytest.mark.parametrize("B", [1, 2, 17])
def test_info_nce_equals_open_clips_clip_loss_whatever_the_bias(B):
    image, text = unit(B, 8), unit(B, 8)
    want = ClipLoss()(image, text, 50.0)
    assert (info_nce_loss(image @ text.T, None, math.log(50.0), -3.0) - want).abs() < 1e-5

def test_info_nce_is_symmetric_and_shares_a_target_among_positives():
    sim, positives = torch.rand(5, 5), torch.eye(5, dtype=torch.bool)
    positives[0, 3] = positives[3, 0] = True
    assert abs(info_nce_loss(sim, positives) - info_nce_loss(sim.T, positives.T)) < 1e-6
    logits, costs = 100 * sim.double(), []
    for i in range(5):
        costs.append(-logits[i].log_softmax(0)[positives[i]].mean() / 2)
        costs.append(-logits[:, i].log_softmax(0)[positives[:, i]].mean() / 2)
    want = torch.stack(costs).sum() / 5
    assert abs(info_nce_loss(sim, positives, math.log(100)).double() - want) < 1e-5

@pytest.mark.parametrize("loss, form", [
    ("sigmoid", "dual"), ("sigmoid", "combined"), ("infonce", "dual"), ("infonce", "combined")])
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

# ---- Encoders, against open_clip's own -----------------------------------------------------------
@pytest.fixture(scope="module", params=["ViT-B-32-quickgelu", "ViT-B-16-quickgelu",
                                        "ViT-B-16-SigLIP"])
def real(request):
    """A randomly initialised model of each of the paper's backbones."""
    torch.manual_seed(0)
    return VideoColBERT(Config(backbone=request.param, pretrained=None, num_frames=2))

def test_one_token_of_q_is_open_clips_text_embedding(real):
    """The end token for CLIP, the last for SigLIP; 32 tokens of CLIP give what its own 77 give."""
    if real.is_siglip:
        ids = theirs = torch.randint(2, 32000, (2, 64))
        got = real.encode_query(ids, torch.ones_like(ids, dtype=torch.bool))[:, -1]
    else:
        ids, mask = real.tokenize(["a man feeds a dog", "x"])
        assert ids.shape == (2, 32)
        got = real.encode_query(ids, mask)[range(2), real.real_tokens(ids).sum(1) - 1]
        theirs = open_clip.get_tokenizer(real.config.backbone)(["a man feeds a dog", "x"])
    with torch.no_grad():
        assert (got - real.clip.encode_text(theirs, normalize=True)).abs().max() < 1e-5

def test_f_is_open_clips_image_embedding(real):
    frames = torch.randint(0, 256, (1, 2, 3, 224, 224), dtype=torch.uint8)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    if real.is_siglip:
        mean = std = (0.5,) * 3
    images = frames[0].float() / 255 - torch.tensor(mean).view(3, 1, 1)
    with torch.no_grad():
        F, V = real.encode_video(frames)
        want = real.clip.encode_image(images / torch.tensor(std).view(3, 1, 1), normalize=True)
    assert (F[0] - want).abs().max() < 1e-5
    assert V.shape == (1, 4, F.shape[-1]) and F.shape[-1] == (768 if real.is_siglip else 512)

def test_parameters_are_frozen_and_grouped_as_in_the_paper_and_a_step_moves_just_the_others(real):
    """Section 5.2: positions, patch and token embeddings frozen; 1e-7 for pre-trained parameters,
    1e-4 for new ones. Biases and norms do not decay."""
    frozen = {n for n, p in real.named_parameters() if not p.requires_grad}
    vision = ["visual.positional_embedding", "visual.conv1.weight"]
    if real.is_siglip:
        vision = ["visual.trunk.pos_embed", "visual.trunk.patch_embed.proj.weight",
                  "visual.trunk.patch_embed.proj.bias"]
    tokens = ["text.positional_embedding", "text.token_embedding.weight"]
    assert frozen == {"clip." + n for n in vision + tokens} | {"logit_scale", "logit_bias"}

    groups = train.make_optimizer(real, train.Settings()).param_groups
    group_of = {id(p): group for group in groups for p in group["params"]}
    for name, p in real.named_parameters():
        if name in frozen:
            assert id(p) not in group_of
            continue
        group = group_of[id(p)]
        assert group["peak_lr"] == (1e-7 if name.startswith("clip.") else 1e-4), name
        assert group["weight_decay"] == (0.01 if p.ndim > 1 else 0), name
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6

    before = {n: p.detach().clone() for n, p in real.named_parameters()}
    ids = torch.randint(2, 32000, (1, real.num_tokens))
    frames = torch.randint(0, 256, (1, 1, 3, 224, 224), dtype=torch.uint8)
    real(ids, torch.ones_like(ids, dtype=torch.bool), frames)[0].backward()
    optimizer = train.make_optimizer(real, train.Settings())
    for group in optimizer.param_groups:
        group["lr"] = 0.1                                         # large, so that a step is seen
    optimizer.step()
    unmoved = {n for n, p in real.named_parameters() if torch.equal(p, before[n])}
    real.load_state_dict({**real.state_dict(), **before})
    real.zero_grad()
    assert unmoved == frozen

def test_the_temporal_transformer_starts_as_the_text_encoders_first_layers(real):
    assert len(real.temporal.blocks) == 4
    for block, theirs in zip(real.temporal.blocks, real.clip.text.transformer.resblocks):
        for p, q in zip(block.parameters(), theirs.parameters()):
            assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()

def test_weights_are_loaded_from_a_file(tmp_path):
    """The encoders and the temporal layers hold what open_clip saved."""
    theirs, file = open_clip.create_model("ViT-S-32"), str(tmp_path / "weights.pt")
    torch.save(theirs.state_dict(), file)
    model = VideoColBERT(Config(backbone="ViT-S-32", pretrained=file))
    assert torch.equal(model.clip.visual.conv1.weight, theirs.visual.conv1.weight)
    weight = theirs.transformer.resblocks[3].mlp.c_fc.weight
    assert torch.equal(model.temporal.blocks[3].mlp.c_fc.weight, weight)
    with pytest.raises(InputError, match="weights.pt' into ViT-S-16"):
        VideoColBERT(Config(backbone="ViT-S-16", pretrained=file))

def test_mean_pooling_is_equation_1():
    """cos(q, mean_n f_n) with open_clip's own pooled query, on F and on V without expansion."""
    model = VideoColBERT(Config(backbone="tiny", num_frames=3, interaction="mp"))
    ids, mask = model.tokenize(["a dog", "a small dog runs"])
    assert mask.int().argmax(1).tolist() == [3, 5] and mask.sum() == 2
    theirs = open_clip.get_tokenizer("ViT-B-32")(["a dog", "a small dog runs"])
    with torch.no_grad():
        F, V = model.encode_video(pixels(3, 3))
        got = model.similarities(model.encode_query(ids, mask), mask, F, V)
        q = model.clip.encode_text(theirs, normalize=True)
    for sim, x in zip(got, (F, V[:, :3])):
        assert (sim - q @ normalize(x.mean(1), dim=-1).T).abs().max() < 1e-5

# ---- Query side ----------------------------------------------------------------------------------
def test_clip_queries_are_start_words_end_and_pads(tiny):
    ids, mask = tiny.tokenize(["a dog !", "a!!!b", "", "dog " * 10_000])
    assert ids.dtype == torch.int64 and ids.shape == mask.shape == (4, 32) and mask.all()
    assert ids[0].tolist() == [49406, 320, 1929, 256, 49407] + [0] * 27
    assert ids[2].tolist() == [49406, 49407] + [0] * 30
    assert ids[3].tolist() == [49406] + [1929] * 30 + [49407]     # cut, with its end token

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
    assert (mean_max_sim(Q, F, mask) - want).abs().max() < 1e-6 and (Q[~mask] == 0).all()
    model.config.query_augmentation = True
    ids, mask = model.tokenize(queries)
    augmented = mean_max_sim(model.encode_query(ids, mask), F, mask)
    assert mask.all() and (augmented - want).abs().max() > 1e-3

# ---- Video side ----------------------------------------------------------------------------------
def test_f_ignores_the_order_of_the_frames_and_v_sees_it(tiny):
    frames = pixels(1, 6)
    Q = tiny.encode_query(*tiny.tokenize(["a dog"]))
    (F, V), (F2, V2) = tiny.encode_video(frames), tiny.encode_video(frames.flip(1))
    assert (F - F2.flip(1)).abs().max() < 1e-5
    assert (mean_max_sim(Q, F) - mean_max_sim(Q, F2)).abs() < 1e-6
    assert (mean_max_sim(Q, V) - mean_max_sim(Q, V2)).abs() > 1e-4

def test_every_frame_and_expansion_token_sees_every_frame(tiny):
    frames = pixels(1, 6)
    changed = frames.clone()
    changed[0, 5] = 0
    (F, V), (F2, V2) = tiny.encode_video(frames), tiny.encode_video(changed)
    assert torch.equal(F[0, :5], F2[0, :5]) and ((V - V2).abs().amax(-1) > 1e-5).all()

def test_one_frame_no_expansion_and_more_layers_than_the_text_encoder_work():
    model = VideoColBERT(Config(backbone="tiny", num_frames=4, visual_expansion=0,
                                temporal_layers=5))
    F, V = model.encode_video(pixels(2, 1))
    assert F.shape == V.shape == (2, 1, 64)

@pytest.mark.parametrize("frames", [pixels(1, 6).float(), pixels(1, 7), pixels(1, 6)[..., :32],
                                    pixels(6)])
def test_frames_of_a_wrong_kind_are_refused(tiny, frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 \(B, 1 to 6, 3, 64, 64\), not "):
        tiny.encode_video(frames)

def test_load_gives_back_what_was_saved_bit_for_bit_without_pickle(tmp_path):
    config = Config(backbone="tiny", num_frames=3, visual_expansion=1, query_augmentation=False,
                    pad_token=31, learn_scale=True)
    model, frames = VideoColBERT(config).eval(), pixels(2, 3)
    model.logit_scale.data.fill_(1.25)
    model.save(tmp_path / "new/folder")
    again = VideoColBERT.load(tmp_path / "new/folder")
    assert again.config == config and not again.training
    assert sorted(p.name for p in (tmp_path / "new/folder").iterdir()) == [
        "config.json", "model.safetensors"]
    for x, y in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(x, y)
    for x, y in zip(model.encode_video(frames), again.encode_video(frames)):
        assert torch.equal(x, y)

def test_a_model_saved_before_a_setting_existed_loads_with_its_default(tmp_path, tiny):
    tiny.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["query_augmentation"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert VideoColBERT.load(tmp_path).config == tiny.config

# ---- Frames of a video file. Frame k of a test clip has brightness 6 k + 8. ---------------------
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

@pytest.mark.parametrize("count, num_frames", [(20, 4), (20, 12), (20, 20), (7, 3), (3, 12), (1, 5),
                                               (20, 1)])
def test_sample_frames_takes_the_middle_of_equal_segments(tmp_path, count, num_frames):
    want = [int((i + 0.5) * count / num_frames) for i in range(num_frames)]
    assert frame_numbers(write_clip(tmp_path / "a.mp4", count), num_frames) == want

def test_sample_frames_takes_a_part_of_a_video(tmp_path):
    """20 frames at 10 a second; an end beyond the video is its end."""
    path = write_clip(tmp_path / "a.mp4")
    assert frame_numbers(path, 5, 0.0, 1.0) == [1, 3, 5, 7, 9]
    assert frame_numbers(path, 5, 1.0) == frame_numbers(path, 5, 1.0, 30.0) == [11, 13, 15, 17, 19]
    with pytest.raises(InputError, match="a.mp4: no frames between start 2.0 and end None"):
        sample_frames(path, 5, 16, 2.0)

def test_a_mistake_in_the_code_is_not_reported_as_a_broken_video(tmp_path, monkeypatch):
    monkeypatch.setattr(video_colbert, "upright_pixels", lambda frame, size: frame.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        sample_frames(write_clip(tmp_path / "a.mp4"), 4, 16)

# ---- Metrics -------------------------------------------------------------------------------------
def test_retrieval_metrics_equal_a_sort_of_every_row():
    sim, target = torch.randn(60, 25), torch.randint(0, 25, (60,))
    ranks = [sorted(range(25), key=lambda b: -row[b]).index(t) + 1 for row, t in zip(sim, target)]
    got = retrieval_metrics(sim, target)
    for k in (1, 5, 10):
        assert got[f"R@{k}"] == pytest.approx(100 * sum(r <= k for r in ranks) / 60)
    gains = [1 / math.log2(1 + r) for r in ranks if r <= 10]
    assert got["nDCG@10"] == pytest.approx(sum(gains) / 60)
    assert got["MdR"] == pytest.approx(np.median(ranks))
    assert got["MnR"] == pytest.approx(np.mean(ranks))

def test_a_tie_counts_against_the_model():
    assert retrieval_metrics(torch.ones(8, 8), torch.arange(8)) == pytest.approx({
        "R@1": 0, "R@5": 0, "R@10": 100, "nDCG@10": 1 / math.log2(9), "MdR": 8, "MnR": 8})
    assert retrieval_metrics([[0.5, 0.5, 0.1]], [0])["MnR"] == 2
    assert retrieval_metrics([[0.5, 0.4, 0.1]], [0])["R@1"] == 100

# ---- Figure 4 ------------------------------------------------------------------------------------
def test_interactions_are_each_words_similarity_to_each_frame(tiny):
    """Subword tokens are averaged; start, end and pads have no place, expansion tokens neither."""
    frames = pixels(6)
    words, before, after = interactions(tiny, "a doggedly  small dog", frames)
    Q = tiny.encode_query(*tiny.tokenize(["a doggedly small dog"]))[0]
    F, V = tiny.encode_video(frames[None])
    assert words == ["a", "doggedly", "small", "dog"]
    assert len(tiny.tokenizer.encode("doggedly")) == 2
    tokens = torch.stack([Q[1], (Q[2] + Q[3]) / 2, Q[4], Q[5]])
    assert (before - tokens @ F[0].T).abs().max() < 1e-6
    assert (after - tokens @ V[0, :6].T).abs().max() < 1e-6
    words, before, _ = interactions(tiny, "dog " * 50, frames[:3])
    assert words == ["dog"] * 30 and before.shape == (30, 3)      # a long query is cut

# ---- train.py: settings --------------------------------------------------------------------------
def test_every_setting_is_an_option_with_its_sentence(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in train.fields(train.Settings):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "frames per video (section 5.2, Table 7)" in text and "default mean and std" in text

def test_what_is_typed_beats_the_presets_and_these_beat_the_paper():
    s = train.parse_settings([])
    assert (s.backbone, s.freeze, s.learn_scale, s.logit_bias) == ("tiny", False, True, -10.0)
    s = train.parse_settings(["--data", "msrvtt"])
    paper = ("ViT-B-32-quickgelu", 12, 32, True, False, 1e-4, 1e-7)
    assert (s.backbone, s.num_frames, s.num_tokens, s.freeze, s.learn_scale, s.lr,
            s.lr_pretrained) == paper
    s = train.parse_settings(["--backbone", "ViT-B-32-quickgelu", "--num-frames", "3"])
    assert (s.backbone, s.freeze, s.num_frames, s.batch_size) == ("ViT-B-32-quickgelu", True, 3, 64)
    assert train.parse_settings(["--data", "msrvtt", "--loss", "infonce"]).learn_scale

def test_input_errors_are_one_line_and_programming_errors_keep_their_traceback(capsys):
    def wrong_input():
        raise InputError("clips.jsonl, line 3: expected a list of captions")
    def wrong_code():
        loss, sim = 1, 2, 3
    with pytest.raises(SystemExit, match="2"):
        train.run_main(wrong_input, "train.py")
    assert capsys.readouterr().err == "train.py: clips.jsonl, line 3: expected a list of captions\n"
    with pytest.raises(ValueError, match="too many values to unpack"):
        train.run_main(wrong_code, "train.py")

# ---- train.py: clips, cache, batches -------------------------------------------------------------
SMALL = ["--backbone", "tiny", "--num-frames", "3", "--num-tokens", "12", "--batch-size", "4",
         "--epochs", "2", "--device", "cpu"]

def write_json_lines(folder, splits="train train train test val test"):
    lines = []
    for i, split in enumerate(splits.split()):
        write_clip(folder / f"{i}/clip.mp4", 4 + i % 30)          # all with one file name
        captions = [f"caption {j} of {i}" for j in range(3 if split == "train" else 1)]
        lines.append({"video": f"{i}/clip.mp4", "captions": captions, "split": split})
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return lines

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
    (tmp_path / "my.jsonl").write_text(text, encoding="utf-8")
    path = f"{tmp_path}/a b.mp4"
    assert train.load_json_lines(f"{tmp_path}/my.jsonl") == {
        "train": [(path, ["one", "שלום 🐕"], 0.0, None), (path, ["c"], 1.0, None)], "val": [],
        "test": [("/x/b.mkv", ["two"], 2, 4.5)]}

def test_missing_data_is_noticed_before_weights_are_fetched_and_says_where_to_get_it(tmp_path):
    with pytest.raises(InputError, match=r"no videos of MSR-VTT in .*nowhere(.|\n)*curl -L -C - -O "
                                         r"https://.*MSRVTT.zip\n.*msrvtt_data.zip\n.*unzip"):
        train.main(["--data", "msrvtt", "--root", f"{tmp_path}/nowhere", "--device", "cpu"])

def test_the_cache_decodes_a_clip_once_until_its_video_changes(tmp_path, monkeypatch):
    """Neither chmod nor `cp -a` changes a video; other content does, even with its size and time;
    a cache file that is damaged in any byte is written again."""
    calls, path = [], write_clip(tmp_path / "a.mp4")
    def counted(*args):
        calls.append(args)
        return sample_frames(*args)
    monkeypatch.setattr(train, "sample_frames", counted)
    def frames(start=0.0):
        return train.cached_frames(train.Clip(str(path), [], start), 4, 16, tmp_path / "cache")
    first = frames()
    assert torch.equal(first, sample_frames(path, 4, 16)) and torch.equal(frames(), first)
    path.chmod(0o600)
    subprocess.run(["cp", "-a", path, tmp_path / "copy"], check=True)
    os.replace(tmp_path / "copy", path)
    assert torch.equal(frames(), first) and len(calls) == 1
    assert not torch.equal(frames(1.0), first) and len(calls) == 2

    for file in (tmp_path / "cache").iterdir():
        good = file.read_bytes()
        if good.startswith(first.numpy().tobytes()):
            break
    for bad in (good[:-1], b"", good + b"x", bytes([good[0] ^ 1]) + good[1:]):
        file.write_bytes(bad)
        assert torch.equal(frames(), first) and file.read_bytes() == good
    assert len(calls) == 6

    status, content = path.stat(), write_clip(tmp_path / "b.mp4", 10).read_bytes()
    path.write_bytes(content.ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(frames(), sample_frames(tmp_path / "b.mp4", 4, 16)) and len(calls) == 7

def test_prefetch_keeps_the_order_and_holds_one_result_per_thread():
    started = []
    results = train.prefetch(lambda i: started.append(i) or i * i, range(100), 3)
    assert next(results) == 0 and len(started) <= 4
    assert list(results) == [i * i for i in range(1, 100)]

@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_an_epoch_has_every_caption_once_in_its_own_order(k):
    clips = [train.Clip("a", list("abc")), train.Clip("b", ["d"]), train.Clip("c", list("efghi"))]
    s = train.Settings(captions_per_video=k, seed=3, epochs=2, batch_size=2)
    first = train.epoch_examples(clips, s, 0)
    captions = sorted((v, c) for v, chosen in first for c in chosen)
    assert captions == [(v, c) for v, n in enumerate((3, 1, 5)) for c in range(n)]
    assert max(len(chosen) for _, chosen in first) == min(k, 5)
    second = train.epoch_examples(clips, s, 1)
    assert train.epoch_examples(clips, s, 0) == first != second
    n = len(first) // 2 * 2
    assert list(itertools.chain(*train.batches(clips, s))) == first[:n] + second[:n]

def test_a_batch_marks_every_true_pair():
    """The same video twice, and a video with the very same caption as another."""
    clips = [train.Clip("0", ["a", "b"]), train.Clip("1", ["c", "d"]), train.Clip("2", ["c", "e"])]
    pairs = train.positive_pairs(clips, [(0, [0]), (1, [0]), (0, [1]), (2, [0])])
    assert pairs.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    pairs = train.positive_pairs(clips, [(0, [0, 1]), (2, [1])])
    assert pairs.int().tolist() == [[1, 0], [1, 0], [0, 1]]

def test_the_schedule_rises_for_a_tenth_and_falls_to_the_end():
    factors = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:] == pytest.approx([(100 - step) / 90 for step in range(10, 100)])

# ---- train.py: runs ------------------------------------------------------------------------------
def records(out):
    return [json.loads(line) for line in open(f"{out}/log.jsonl")]

def test_a_run_leaves_its_folder_and_a_table_and_repeats_exactly(data, capsys):
    """Also with another number of threads and an empty cache."""
    flags = [*SMALL, "--data", "clips.jsonl", "--eval-every", "2"]
    train.main([*flags, "--out", "a"])
    train.main([*flags, "--out", "b", "--workers", "1", "--cache", "cache2"])
    files = {"config.json", "log.jsonl", "model.safetensors", "settings.json"}
    assert set(os.listdir("a")) == files
    for name in ("model.safetensors", "log.jsonl"):
        assert (data / "a" / name).read_bytes() == (data / "b" / name).read_bytes()
    log = records("a")
    assert [list(line)[-1] for line in log] == ["grad_norm", "grad_norm", "val R@1", "grad_norm",
                                                "grad_norm", "val R@1", "test R@1", "machine"]
    assert log[-1]["gallery"] == 2 and len(log[-1]["evaluation"]) == 8
    assert video_colbert.results_table(log[-1]) in capsys.readouterr().out
    assert VideoColBERT.load("a").config.num_frames == 3

def test_micro_batches_change_nothing_but_the_memory(data):
    """Of 4 videos with up to two captions each, 3 and 1 or 1 at a time."""
    flags = [*SMALL, "--data", "clips.jsonl", "--captions-per-video", "2"]
    for n in (0, 3, 1):
        train.main([*flags, "--out", f"run{n}", "--micro-batch", f"{n}"])
    for whole, *parts in zip(records("run0"), records("run3"), records("run1"), strict=True):
        for line in parts:
            for name in {"loss", "MMS_F", "MMS_V", "grad_norm"} & whole.keys():
                assert line[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6)

def test_evaluation_needs_no_training_data_and_gives_a_runs_numbers_again(data, monkeypatch):
    train.main([*SMALL, "--data", "clips.jsonl", "--out", "a"])
    train.main(["--eval-only", "a", "--out", "b"])
    assert records("b")[0]["evaluation"] == records("a")[-1]["evaluation"]
    assert sorted(os.listdir("b")) == ["log.jsonl", "settings.json"]
    (data / "other.jsonl").write_text((data / "clips.jsonl").read_text().splitlines()[3])
    train.main(["--eval-only", "a", "--data", "other.jsonl"])
    assert records("runs/other-eval")[0]["gallery"] == 1

def contents(out):
    return {name: open(f"{out}/{name}", "rb").read() for name in ("log.jsonl", "model.safetensors")}

class Killed(Exception):
    pass

def run_until(monkeypatch, flags, function, call):
    """Run until a function of train.py is called for the call-th time, as if killed there."""
    calls, original = itertools.count(), getattr(train, function)
    def dies(*args):
        if next(calls) == call:
            raise Killed
        return original(*args)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, function, dies)
        train.main(flags)

@pytest.mark.parametrize("function, call, every", [
    ("training_step", 1, 1), ("save_checkpoint", 1, 500), ("result_rows", 0, 500)])
def test_a_killed_run_resumes_to_the_same_bytes(data, monkeypatch, function, call, every):
    flags = [*SMALL, "--data", "clips.jsonl", "--checkpoint-every", str(every)]
    train.main([*flags, "--out", "whole"])
    run_until(monkeypatch, [*flags, "--out", "a"], function, call)
    (data / "a").rename("moved")
    train.main(["--resume", "moved", "--workers", "2", "--cache", "cache2"])
    assert contents("moved") == contents("whole")

def test_a_few_clips_are_overfitted_from_file_to_recall(tmp_path):
    """Among 12 clips of one colour each, nearly every query finds its own."""
    clips = []
    for i in range(12):
        color = np.full((32, 48, 3), [85 * (i % 4), 127 * (i // 4), 60], np.uint8)
        path = write_clip(tmp_path / f"{i}.mp4", 6, picture=color)
        clips.append(train.Clip(str(path), [f"color {'abcdefghijkl'[i]}"] * 10))
    s = train.parse_settings(["--num-frames", "2", "--num-tokens", "8", "--epochs", "20",
                              "--batch-size", "12", "--cache", f"{tmp_path}/cache"])
    model, data = VideoColBERT(s), {"train": clips, "val": [], "test": clips}
    train.train(model, data, s, torch.device("cpu"), tmp_path, "data")
    losses = [line["loss"] for line in records(tmp_path)]
    sim_F, sim_V, target = train.evaluate(model, clips, s, torch.device("cpu"))
    assert retrieval_metrics(mms_fv(sim_F, sim_V), target)["R@1"] >= 90
    assert losses[-1] < losses[0] / 4
