"""Turn MSVD, VATEX, DiDeMo or ActivityNet Captions, as they lie on disk, into JSON lines.

    python -m extras.datasets msvd FOLDER
    python -m extras.datasets vatex FOLDER --out clips.jsonl     default FOLDER/clips.jsonl

Prints what was found, and the command that trains on it with the paper's frames and tokens. Missing
training and validation videos are left out of the file. Missing test videos stay in it: train.py
then needs --allow-missing, and its table says how many are missing.
"""
import argparse
import io
import json
import os
import pickle
import shlex
from pathlib import Path
from textwrap import shorten

from train import Clip, find_files, get_field, read_file, run_main, validate_clips
from video_colbert import InputError, write_file

SPLITS = ("train", "val", "test")
VIDEO_ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".flv")

# ---- Files ---------------------------------------------------------------------------------------
def find_file(root, name):
    """The file of this name in or below a folder."""
    found = find_files(root, name)
    if not found:
        raise InputError(f"no {name} in {root}")
    return found[0]

def index_videos(root):
    """{file name, with and without its ending: path} of all videos in or below a folder."""
    paths = [path for path in find_files(root, "*") if path.lower().endswith(VIDEO_ENDINGS)]
    if not paths:
        raise InputError(f"no videos ({' '.join(VIDEO_ENDINGS)}) in {root}")
    paths.reverse()                                               # so that the first of a name wins
    return {Path(path).stem: path for path in paths} | {Path(path).name: path for path in paths}

def find_video(videos, video, root):
    """Where a video of the annotation is, or would be. Copies are often re-encoded under another
    ending, and ActivityNet's are named with or without `v_`."""
    has_ending = video.lower().endswith(VIDEO_ENDINGS)
    stem = os.path.splitext(video)[0] if has_ending else video    # an id may hold a dot
    for name in (video, stem, video.removeprefix("v_"), f"v_{video}"):
        if name in videos:
            return videos[name]
    return os.path.join(root, video if has_ending else f"{video}.mp4")

def read_json(path, kind):
    """The content of a JSON file that must be a list or a dict."""
    content = read_file(path, json.load)
    if not isinstance(content, kind):
        raise InputError(f"{path}: expected a {kind.__name__}, got {content!r:.100}")
    return content

def read_records(path, video_field, text_field):
    """A JSON list of dictionaries -> [(video, its text)]. A video may have several."""
    pairs = []
    for record in read_json(path, list):
        if not isinstance(get_field(record, video_field), str):
            raise InputError(f"{path}: expected a {video_field}, got {record!r:.100}")
        pairs.append((record[video_field], record.get(text_field)))
    return pairs

def join_texts(texts):
    """Words or sentences as one string. validate_clips refuses what this returns unchanged."""
    if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
        return " ".join(text.strip() for text in texts)
    return texts

def listed_splits(root, captions, required):
    """The splits that train_list.txt, val_list.txt and test_list.txt, an id per line, make of
    {id: captions}. A list that is not required may be missing."""
    for split in SPLITS:
        if split in required or find_files(root, f"{split}_list.txt"):
            path = find_file(root, f"{split}_list.txt")
            ids = [line.strip() for line in read_file(path, list) if line.strip()]
            yield split, path, [(video, captions.get(video)) for video in ids]

# ---- Datasets: each yields a split, the file that lists its videos, and [(video, [captions])]. ---
class PlainUnpickler(pickle.Unpickler):
    """Only containers and strings: a pickle can name any function, and have it called."""

    def find_class(self, module, name):
        if (module, name) in {("builtins", "list"), ("builtins", "dict"),
                              ("collections", "OrderedDict"), ("collections", "defaultdict")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no captions need")

def load_msvd(root):
    """1,200 training, 100 validation and 670 test videos of about 40 captions, each a query."""
    path = find_file(root, "raw-captions.pkl")
    try:
        content = PlainUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="utf-8").load()
    except Exception as error:                                    # a pickle can fail in any way
        raise InputError(f"{path} holds no captions: {shorten(str(error), 200)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no captions: expected a dict, got {content!r:.100}")
    captions = {video: list(map(join_texts, texts)) if isinstance(texts, (list, tuple)) else texts
                for video, texts in content.items()}              # a caption is a list of words
    yield from listed_splits(root, captions, required=("train", "test"))

def load_vatex(root):
    """English captions, ten a video. Lists of ids halve the 3,000 validation videos into 1,500 for
    validation and 1,500 for the test (HGR); without a list, all training videos are trained on."""
    captions = {}
    for part in ("validation", "training"):
        path = find_file(root, f"vatex_{part}_v1.0.json")
        records = read_records(path, "videoID", "enCap")
        if len(dict(records)) < len(records):
            raise InputError(f"{path}: expected each videoID only once")
        captions.update(records)
    if not find_files(root, "train_list.txt"):
        yield "train", path, records
    yield from listed_splits(root, captions, required=("test",))

def load_didemo(root):
    """All descriptions of a video, in the order of the file, are one paragraph."""
    for split in SPLITS:
        if split != "val" or find_files(root, "val_data.json"):
            path, descriptions = find_file(root, f"{split}_data.json"), {}
            for video, description in read_records(path, "video", "description"):
                descriptions.setdefault(video, []).append(description)
            yield split, path, [(v, [join_texts(texts)]) for v, texts in descriptions.items()]

def load_activitynet(root):
    """All sentences of a video are one paragraph. The test split is val_1, of 4,917 videos."""
    for split, name, ids_name in (("train", "train.json", "train_ids.json"),
                                  ("test", "val_1.json", "val_ids.json")):
        path = find_file(root, name)
        captions = {video: [join_texts(get_field(record, "sentences"))]
                    for video, record in read_json(path, dict).items()}
        ids = list(captions)
        if find_files(root, ids_name):
            path = find_file(root, ids_name)
            ids = list(map(str, read_json(path, list)))
        yield split, path, [(video, captions.get(video)) for video in ids]

LOADERS = {"msvd": load_msvd, "vatex": load_vatex, "didemo": load_didemo,
           "activitynet": load_activitynet}
LONG = ("didemo", "activitynet")       # queries are paragraphs: 64 frames, 64 tokens (section 5.2)

# ---- Conversion ----------------------------------------------------------------------------------
def convert(dataset, root, out):
    """Write a dataset's JSON lines -> the lines to print."""
    if not os.path.isdir(root):
        raise InputError(f"no folder {root}")
    if not out.endswith(".jsonl"):
        raise InputError(f"--out {out}: train.py expects a file that ends in .jsonl")
    videos, records, summary = index_videos(root), [], []
    command = ["python", "train.py", "--data", out]
    command += ["--num-frames", "64", "--num-tokens", "64"] if dataset in LONG else []
    end = 30 if dataset == "didemo" else None    # seconds; no description is about what comes later
    for split, source, annotated in LOADERS[dataset](root):
        clips = [Clip(find_video(videos, video, root), captions, end=end)
                 for video, captions in annotated]
        validate_clips([(clip, source) for clip in clips])
        missing = [clip.path for clip in clips if not os.path.exists(clip.path)]
        if split != "test":
            clips = [clip for clip in clips if os.path.exists(clip.path)]
        if not clips and split != "val":
            raise InputError(f"{source}: none of its {len(missing)} videos is in {root}")
        records += [to_record(clip, split, out) for clip in clips]
        summary.append(f"{split}: {len(clips)} videos, "
                       f"{sum(len(clip.captions) for clip in clips)} captions")
        if missing and split == "test":
            command.append("--allow-missing")
            summary.append(f"  {len(missing)} of them missing and kept in the file; a result "
                           "without them is not comparable:")
        elif missing:
            summary.append(f"  {len(missing)} more missing and left out:")
        summary += [f"    {os.path.basename(path)}" for path in missing[:20]]
        if len(missing) > 20:
            summary.append(f"    ... and {len(missing) - 20} more")
    write_file(out, *(f"{json.dumps(line, ensure_ascii=False)}\n".encode() for line in records))
    return [*summary, f"wrote {out}; to train on it:", shlex.join(command)]

def to_record(clip, split, out):
    """A clip as a line of JSON; its path is relative if the video is below the file's folder."""
    video, folder = Path(os.path.abspath(clip.path)), Path(os.path.abspath(out)).parent
    video = video.relative_to(folder) if video.is_relative_to(folder) else video
    record = {"video": str(video), "captions": clip.captions, "split": split}
    return record if clip.end is None else {**record, "end": clip.end}

def main(argv=None):
    parser = argparse.ArgumentParser("python -m extras.datasets", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=LOADERS)
    parser.add_argument("folder", help="annotation and videos lie in or below it")
    parser.add_argument("--out", help="a file that ends in .jsonl; default FOLDER/clips.jsonl")
    arguments = parser.parse_args(argv)
    out = arguments.out or os.path.join(arguments.folder, "clips.jsonl")
    print(*convert(arguments.dataset, arguments.folder, out), sep="\n")

if __name__ == "__main__":
    run_main(main, "extras.datasets")
