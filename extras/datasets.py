"""Turn a dataset as it lies on disk into JSON lines that train.py reads.

    python -m extras.datasets msvd FOLDER           also vatex, didemo and activitynet
    python -m extras.datasets vatex FOLDER --out FILE.jsonl

Prints what was found, and the command to train with the paper's frames and tokens. Training videos
that are missing are left out. Missing test videos stay in the file: train.py then wants
--allow-missing and says in its table that the result is not comparable.
"""
import json
import os
import pickle
from pathlib import Path
from typing import Literal

import tyro

from train import Clip, find_files, get_field, read_file, run_main, validate_clips
from video_colbert import InputError, write_file

VIDEO_ENDINGS = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".flv"}

# ---- Files ---------------------------------------------------------------------------------------
def require(root, name):
    """The file of this name in or below a folder."""
    found = find_files(root, name)
    if not found:
        raise InputError(f"no {name} in {root}")
    return found[0]

def video_finder(root):
    """A function from the names that a video may have to its path. Copies often have another
    ending, so the full name is tried first and then the name without its ending."""
    by_name, by_stem = {}, {}
    for path in map(Path, find_files(root, "*")):
        if path.suffix.lower() in VIDEO_ENDINGS:
            by_name.setdefault(path.name, str(path))
            by_stem.setdefault(path.stem, str(path))
    if not by_name:
        raise InputError(f"no videos in {root}")

    def find(*names):
        for name in names:
            stem, ending = os.path.splitext(name)
            stem = stem if ending.lower() in VIDEO_ENDINGS else name
            path = by_name.get(name) or by_stem.get(name) or by_stem.get(stem)
            if path:
                return path
        is_file_name = os.path.splitext(names[0])[1].lower() in VIDEO_ENDINGS
        return os.path.join(root, names[0] if is_file_name else f"{names[0]}.mp4")
    return find

def read_json(root, name, kind):
    """A JSON file whose top level is a list or a dictionary -> its path and content."""
    path = require(root, name)
    content = read_file(path, json.load)
    if not isinstance(content, kind):
        raise InputError(f"{path}: expected a {kind.__name__}")
    return path, content

def read_ids(root, name):
    """A text file with one id per line -> its path and the ids."""
    path = require(root, name)
    return path, [line.strip() for line in read_file(path, list) if line.strip()]

# ---- Datasets: each function yields split, [ids], {id: [captions]} and the file of the ids. ------
class PlainUnpickler(pickle.Unpickler):
    """Containers and strings only: a pickle can name any function, and have it called."""

    def find_class(self, module, name):
        if (module, name) in {("collections", "OrderedDict"), ("collections", "defaultdict"),
                              ("builtins", "list"), ("builtins", "dict")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no captions need")

def msvd(root):
    """1,200 training, 100 validation and 670 test videos with about 40 captions, each a query."""
    source = require(root, "raw-captions.pkl")
    try:
        with open(source, "rb") as file:
            content = PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:                                    # a pickle can fail in any way
        raise InputError(f"{source}: {str(error).partition(chr(10))[0] or type(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{source}: expected a dictionary of captions")
    captions = {}
    for video, texts in content.items():
        texts = texts if isinstance(texts, list) else [texts]
        captions[video] = [" ".join(map(str, text)) if isinstance(text, list) else text
                           for text in texts]
    for split in ("train", "val", "test"):
        if split != "val" or find_files(root, "val_list.txt"):
            path, ids = read_ids(root, f"{split}_list.txt")
            yield split, ids, captions, path

def vatex(root):
    """English captions, ten a video. Lists halve the 3,000 validation videos into 1,500 to validate
    and 1,500 to test (HGR)."""
    captions, train = {}, []
    for part in ("training", "validation"):
        source, content = read_json(root, f"vatex_{part}_v1.0.json", list)
        for record in content:
            video = str(get_field(record, "videoID"))
            if video in captions:
                raise InputError(f"{source}: {video!r} is there twice")
            captions[video] = get_field(record, "enCap")
        train = train or list(captions)
    for split in ("train", "val", "test"):
        if split == "test" or find_files(root, f"{split}_list.txt"):
            path, ids = read_ids(root, f"{split}_list.txt")
            yield split, ids, captions, path
        elif split == "train":
            yield split, train, captions, require(root, "vatex_training_v1.0.json")

def didemo(root):
    """All descriptions of a video, in the order of the file, are one paragraph."""
    for split in ("train", "val", "test"):
        if split != "val" or find_files(root, "val_data.json"):
            source, content = read_json(root, f"{split}_data.json", list)
            paragraphs = {}
            for record in content:
                sentence = str(get_field(record, "description") or "").strip()
                paragraphs.setdefault(str(get_field(record, "video")), []).append(sentence)
            captions = {video: [" ".join(texts)] for video, texts in paragraphs.items()}
            yield split, list(captions), captions, source

def activitynet(root):
    """All sentences of a video are one paragraph. The test is val_1."""
    for split, name, ids_name in (("train", "train.json", "train_ids.json"),
                                  ("test", "val_1.json", "val_ids.json")):
        source, content = read_json(root, name, dict)
        captions = {}
        for video, record in content.items():
            sentences = get_field(record, "sentences")
            if not isinstance(sentences, list):
                raise InputError(f"{source}: expected a list of sentences for {video!r}")
            captions[video] = [" ".join(str(sentence).strip() for sentence in sentences)]
        ids = list(captions)
        if find_files(root, ids_name):
            source, ids = read_json(root, ids_name, list)
        yield split, [str(video) for video in ids], captions, source

# ---- Conversion ----------------------------------------------------------------------------------
DATASETS = {"msvd": (msvd, ""), "vatex": (vatex, ""),          # with the paper's flags (5.2)
            "didemo": (didemo, " --num-frames 64 --num-tokens 64"),
            "activitynet": (activitynet, " --num-frames 64 --num-tokens 64")}

def convert(name, folder, out):
    """Write the JSON-lines file -> what to print."""
    if not os.path.isdir(folder):
        raise InputError(f"no folder {folder}")
    loader, flags = DATASETS[name]
    find, lines, summary, allow_missing = video_finder(folder), [], [], ""
    for split, ids, captions, source in loader(folder):
        clips = []
        for video in ids:
            names = [video]
            if name == "activitynet":
                names += [video.removeprefix("v_"), f"v_{video}"]
            end = 30.0 if name == "didemo" else None              # its captions cover 30 seconds
            clips.append(Clip(find(*names), captions.get(video), 0.0, end))
        validate_clips(clips, [source] * len(clips))
        missing = [clip.path for clip in clips if not os.path.exists(clip.path)]
        summary.append(f"{split}: {len(clips)} videos, {sum(len(clip.captions) for clip in clips)} "
                       f"captions, {len(missing)} videos missing")
        for path in missing[:20]:
            summary.append(f"  missing: {os.path.basename(path)}")
        if len(missing) > 20:
            summary.append(f"  ... and {len(missing) - 20} more")
        if missing and split == "test":
            summary.append("  they stay in the file: a result without them is not comparable")
            allow_missing = " --allow-missing"
        for clip in clips:
            if split == "test" or os.path.exists(clip.path):
                inside = os.path.relpath(clip.path, os.path.dirname(os.path.abspath(out)))
                path = os.path.abspath(clip.path) if inside.startswith("..") else inside
                line = {"video": path, "captions": clip.captions, "split": split}
                lines.append({**line, "end": clip.end} if clip.end else line)
    write_file(out, *(f"{json.dumps(line, ensure_ascii=False)}\n".encode() for line in lines))
    return [*summary, f"python train.py --data {out}{flags}{allow_missing}"]

def convert_dataset(name: tyro.conf.Positional[Literal["msvd", "vatex", "didemo", "activitynet"]],
                    folder: tyro.conf.Positional[str], out: str = ""):
    """Turn a dataset into JSON lines; `out` is by default FOLDER/clips.jsonl."""
    print(*convert(name, folder, out or os.path.join(folder, "clips.jsonl")), sep="\n")

def main(argv=None):
    tyro.cli(convert_dataset, args=argv)

if __name__ == "__main__":
    run_main(main, "extras.datasets")
