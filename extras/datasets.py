"""Turn MSR-VTT, MSVD, VATEX, DiDeMo or ActivityNet Captions, as downloaded, into JSON lines.

    python -m extras.datasets msvd FOLDER
    python -m extras.datasets vatex FOLDER --out clips.jsonl  # default FOLDER/clips.jsonl

Prints what was found, and the command that trains on it with the paper's number of frames
and tokens. Missing training and validation videos are left out of the file. Missing test
videos stay in it: train.py then needs --allow-missing, and its table counts them.
"""
import argparse
import csv
import io
import json
import os
import pickle
import shlex
from pathlib import Path
from textwrap import shorten

from train import Clip, atomic_write, find_files, first_copy, read_file, run_main
from video_colbert import InputError

SPLITS = ("train", "val", "test")
VIDEO_ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp",
                 ".flv", ".wmv", ".ts", ".mts", ".m2ts", ".vob", ".ogv")

# ---- Files
def find_file(root, name, hint=""):
    """The file of this name in or below a folder. `hint` says where one gets it."""
    found = find_files(root, name)
    if not found:
        raise InputError(f"no {name} in {root}{hint}")
    return first_copy(found)

def index_videos(root):
    """{file name, with and without its ending: paths} of all videos in or below a folder."""
    paths = [path for path in find_files(root, "*") if path.lower().endswith(VIDEO_ENDINGS)]
    if not paths:
        raise InputError(f"no videos ({' '.join(VIDEO_ENDINGS)}) in {root}")
    by_name, by_stem = {}, {}
    for path in paths:
        name = Path(path).name
        by_name.setdefault(name, []).append(path)
        # Of several endings, such as .mkv and .mp4, the first.
        by_stem.setdefault(Path(path).stem, by_name[name])
    return by_stem | by_name

def find_video(videos, video, root):
    """Where a video of the annotation is, or would be. Copies are often re-encoded under
    another ending, and ActivityNet's are named with or without `v_`."""
    has_ending = video.lower().endswith(VIDEO_ENDINGS)
    # Only a known ending is cut off, because an id may contain a dot.
    stem = os.path.splitext(video)[0] if has_ending else video
    for name in (video, stem, video.removeprefix("v_"), f"v_{video}"):
        if name in videos:
            return first_copy(videos[name])
    return os.path.join(root, video if has_ending else f"{video}.mp4")

def get_field(record, name):
    """record[name] of JSON that may be anything, or None."""
    return record.get(name) if isinstance(record, dict) else None

def read_json(path, kind):
    """The content of a JSON file that must be a list or a dict."""
    content = read_file(path, json.load)
    if not isinstance(content, kind):
        raise InputError(f"{path}: expected a {kind.__name__}, got {content!r:.100}")
    return content

def read_table(path):
    """The rows of a CSV file with a header, as dicts."""
    return read_file(path, lambda file: list(csv.DictReader(file)))

def pair_up(path, records, video_field, text_field):
    """Dicts read from `path` -> [(video, its text)]. A video may have several."""
    pairs = []
    for record in records:
        video = get_field(record, video_field)
        if not isinstance(video, str):
            raise InputError(f"{path}: expected a {video_field}, got {record!r:.100}")
        pairs.append((video, record.get(text_field)))
    return pairs

def join_texts(texts):
    """Words or sentences as one string. Anything else is returned for Clip to refuse."""
    if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
        return " ".join(text.strip() for text in texts)
    return texts

def listed_splits(root, captions, required):
    """Split {video: captions} by train_list.txt, val_list.txt and test_list.txt, which have
    an id on each line. A list that is not required may be missing."""
    for split in SPLITS:
        name = f"{split}_list.txt"
        if split in required or find_files(root, name):
            path = find_file(root, name)
            lines = [line.strip() for line in read_file(path, list)]
            yield split, path, [(video, captions.get(video)) for video in lines if video]

# ---- Datasets
# Each yields a split, the file that lists its videos, and [(video, [captions])].
def load_msrvtt(root):
    """9k training and 1k-A test videos (section 5.1), from the copy of CLIP4Clip, of Frozen
    in Time or of the official challenge. Without MSRVTT_train.9k.csv all videos that are
    not tested are trained on. A test video has one query."""
    hint = ": it is in CLIP4Clip's msrvtt_data.zip, see README.md"
    test_path = find_file(root, "MSRVTT_JSFUSION_test.csv", hint)
    test = [(row.get("video_id"), [row.get("sentence")]) for row in read_table(test_path)]
    found = (find_files(root, "MSRVTT_data.json")  # CLIP4Clip
             or find_files(root, "MSR_VTT.json")  # Frozen in Time
             or find_files(root, "*_videodatainfo.json"))  # the challenge, in two files
    if not found:
        raise InputError(f"no MSRVTT_data.json, MSR_VTT.json or *_videodatainfo.json in {root}")
    names = dict.fromkeys(Path(path).name for path in found)  # copies have the same one
    paths = [find_file(root, name) for name in names]

    captions = {}
    for path in paths:
        content = read_json(path, dict)
        name, video_field = "sentences", "video_id"
        if "annotations" in content:
            name, video_field = "annotations", "image_id"
        sentences = content.get(name)
        if not isinstance(sentences, list):
            raise InputError(f"{path}: expected a list of sentences or annotations")
        for video, text in pair_up(path, sentences, video_field, "caption"):
            captions.setdefault(video, []).append(text)

    train_path = paths[0]
    tested = {video for video, _ in test}
    train = [video for video in captions if video not in tested]
    if find_files(root, "MSRVTT_train.9k.csv"):
        train_path = find_file(root, "MSRVTT_train.9k.csv")
        train = [row.get("video_id") for row in read_table(train_path)]
    yield "train", train_path, [(video, captions.get(video)) for video in train]
    yield "test", test_path, test

class PlainUnpickler(pickle.Unpickler):
    """Only containers and strings, because a pickle can call any function that it names."""

    PLAIN = {("builtins", "list"), ("builtins", "dict"), ("collections", "OrderedDict"),
             ("collections", "defaultdict")}

    def find_class(self, module, name):
        if (module, name) not in self.PLAIN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)

def load_msvd(root):
    """1,200 training, 100 validation and 670 test videos of about 40 captions, each a query."""
    path = find_file(root, "raw-captions.pkl")
    try:
        file = io.BytesIO(Path(path).read_bytes())
        content = PlainUnpickler(file, encoding="utf-8").load()
    # A damaged pickle can fail in any way.
    except Exception as error:
        raise InputError(f"{path} holds no captions: {shorten(str(error), 200)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no captions: expected a dict, got {content!r:.100}")

    captions = {}
    for video, texts in content.items():
        if isinstance(texts, (list, tuple)):
            texts = [join_texts(words) for words in texts]
        captions[video] = texts
    yield from listed_splits(root, captions, required=("train", "test"))

def load_vatex(root):
    """English captions, ten per video. Lists of ids split the 3,000 validation videos into
    1,500 for validation and 1,500 for the test (HGR). Without train_list.txt all training
    videos are trained on."""
    captions = {}
    for part in ("validation", "training"):
        path = find_file(root, f"vatex_{part}_v1.0.json")
        pairs = pair_up(path, read_json(path, list), "videoID", "enCap")
        if len(dict(pairs)) < len(pairs):
            raise InputError(f"{path}: expected each videoID only once")
        captions.update(pairs)
    if not find_files(root, "train_list.txt"):
        yield "train", path, pairs
    yield from listed_splits(root, captions, required=("test",))

def load_didemo(root):
    """All descriptions of a video, in the order of the file, are one paragraph."""
    for split in SPLITS:
        name = f"{split}_data.json"
        if split == "val" and not find_files(root, name):
            continue
        path, descriptions = find_file(root, name), {}
        for video, text in pair_up(path, read_json(path, list), "video", "description"):
            descriptions.setdefault(video, []).append(text)
        yield split, path, [(v, [join_texts(texts)]) for v, texts in descriptions.items()]

def load_activitynet(root):
    """All sentences of a video are one paragraph. The test split is val_1, 4,917 videos."""
    for split, name, ids_name in (("train", "train.json", "train_ids.json"),
                                  ("test", "val_1.json", "val_ids.json")):
        path = find_file(root, name)
        captions = {}
        for video, record in read_json(path, dict).items():
            captions[video] = [join_texts(get_field(record, "sentences"))]
        ids = list(captions)
        if find_files(root, ids_name):
            path = find_file(root, ids_name)
            ids = [str(video) for video in read_json(path, list)]
        yield split, path, [(video, captions.get(video)) for video in ids]

LOADERS = {"msrvtt": load_msrvtt, "msvd": load_msvd, "vatex": load_vatex,
           "didemo": load_didemo, "activitynet": load_activitynet}
# Their queries are paragraphs, for which the paper uses 64 frames and 64 tokens (5.2).
LONG = ("didemo", "activitynet")
# DiDeMo's descriptions are about the first 30 seconds of a video.
ENDS = {"didemo": 30}

# ---- Conversion
def convert(dataset, root, out):
    """Write a dataset's JSON lines -> the lines to print."""
    if not os.path.isdir(root):
        raise InputError(f"no folder {root}")
    if not out.endswith(".jsonl"):
        raise InputError(f"--out {out}: train.py expects a file that ends in .jsonl")
    videos = index_videos(root)
    command = ["python", "train.py", "--data", out]
    if dataset in LONG:
        command += ["--num-frames", "64", "--num-tokens", "64"]

    records, summary = [], []
    for split, source, annotated in LOADERS[dataset](root):
        clips = make_clips(source, annotated, videos, root, ENDS.get(dataset))
        missing = [clip for clip in clips if not os.path.exists(clip.path)]
        kept = clips
        if split != "test":
            kept = [clip for clip in clips if os.path.exists(clip.path)]
        elif missing:
            command.append("--allow-missing")
        if not kept and split != "val":
            raise InputError(f"{source}: none of its {len(missing)} videos is in {root}")
        records += [to_record(clip, split, out) for clip in kept]
        summary += describe(split, kept, missing)

    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    content = "".join(lines).encode()
    if os.path.isfile(out) and Path(out).read_bytes() != content:
        raise InputError(f"{out} is there, with other lines: remove it, or use --out")
    with atomic_write(Path(out)) as file:
        file.write(content)
    return [*summary, f"wrote {out}; to train on it:", shlex.join(command)]

def make_clips(source, annotated, videos, root, end):
    """[(video, captions)], listed in the file `source`, as clips. Refuses what is no clip."""
    clips, seen = [], set()
    for video, captions in annotated:
        try:
            if not isinstance(video, str) or not video.strip():
                raise ValueError("expected the name of a video")
            clip = Clip(find_video(videos, video, root), captions, end=end)
            path = os.path.realpath(clip.path)  # refuses a zero byte
            if path in seen:
                raise ValueError("expected each clip only once")
            # JSON may hold half of a surrogate pair, which cannot be written.
            "".join([clip.path, *captions]).encode()
        except InputError:
            raise  # of two files of one name
        except ValueError as error:
            raise InputError(f"{source}: {error}, got {(video, captions)!r:.200}") from None
        seen.add(path)
        clips.append(clip)
    return clips

def to_record(clip, split, out):
    """A clip as JSON. Its path is relative if the video is below the folder of the file."""
    video = Path(os.path.abspath(clip.path))
    folder = Path(os.path.abspath(out)).parent
    if video.is_relative_to(folder):
        video = video.relative_to(folder)
    record = {"video": str(video), "captions": clip.captions, "split": split}
    if clip.end is not None:
        record["end"] = clip.end
    return record

def describe(split, kept, missing):
    """The lines to print about a split."""
    captions = sum(len(clip.captions) for clip in kept)
    lines = [f"{split}: {len(kept)} videos, {captions} captions"]
    if missing and split == "test":
        lines.append(f"  {len(missing)} of them missing and kept in the file; a result "
                     "without them is not comparable:")
    elif missing:
        lines.append(f"  {len(missing)} more missing and left out:")
    lines += [f"    {os.path.basename(clip.path)}" for clip in missing[:20]]
    if len(missing) > 20:
        lines.append(f"    ... and {len(missing) - 20} more")
    return lines

def main(argv=None):
    parser = argparse.ArgumentParser("python -m extras.datasets", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=LOADERS)
    parser.add_argument("folder", help="annotation and videos are in or below it")
    parser.add_argument("--out", help="a file that ends in .jsonl; default FOLDER/clips.jsonl")
    arguments = parser.parse_args(argv)
    out = arguments.out or os.path.join(arguments.folder, "clips.jsonl")
    print(*convert(arguments.dataset, arguments.folder, out), sep="\n")

if __name__ == "__main__":
    run_main(main, "extras.datasets")
