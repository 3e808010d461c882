"""The paper's tables: the flags of each row, the numbers that it reports, and cells of them."""
import statistics

METRICS = ("R@1", "R@5", "R@10", "nDCG@10")
MAIN = (48.1, 74.9, 83.9, .652)
MP, INFONCE = ["--interaction", "mp"], ["--loss", "infonce"]
FRAME_ONLY, VIDEO_ONLY = ["--lambda-video", "0"], ["--lambda-frame", "0"]
COMBINED, NO_AUGMENTATION = ["--loss-form", "combined"], ["--no-query-augmentation"]
SIGLIP = ["--backbone", "ViT-B-16-SigLIP"]
NO_EXPANSION = ["--visual-expansion", "0"]

# (row, flags, score, the paper's numbers)
TABLES = {
    0: ("Scores of one setting", [
        ("MMS_F", [], "MMS_F", None),
        ("MMS_V", [], "MMS_V", None),
        ("MMS_FV", [], "MMS_FV", None),
        ("RRF", [], "RRF", None)]),
    3: ("Table 3: interaction", [
        ("MP on frames", [*MP, *FRAME_ONLY], "MP_F", (42.1, 69.6, 79.3, .601)),
        ("MP on video", [*MP, *VIDEO_ONLY], "MP_V", (43.4, 70.4, 80.1, .610)),
        ("MMS_F", FRAME_ONLY, "MMS_F", (44.3, 71.5, 82.4, .626)),
        ("MMS_V", VIDEO_ONLY, "MMS_V", (47.0, 74.1, 82.4, .643)),
        ("MMS_FV", [], "MMS_FV", MAIN),
        ("RRF", [], "RRF", (46.8, 74.6, 83.8, .646))]),
    4: ("Table 4: loss", [
        ("combined InfoNCE", [*INFONCE, *COMBINED], "MMS_FV", (45.1, 71.4, 81.4, .625)),
        ("combined sigmoid", COMBINED, "MMS_FV", (47.1, 73.1, 83.9, .647)),
        ("dual InfoNCE", INFONCE, "MMS_FV", (45.3, 73.0, 83.8, .640)),
        ("dual sigmoid", [], "MMS_FV", MAIN),
        ("CLIP4Clip meanP (Table 1)", [*INFONCE, *MP, *FRAME_ONLY], "MP_F",
         (43.1, 70.4, 80.8, None)),
        # It has no expansion tokens.
        ("CLIP4Clip seqTransf (Table 1)",
         [*INFONCE, *MP, *VIDEO_ONLY, *NO_EXPANSION], "MP_V", (44.5, 71.4, 81.6, None)),
        ("SigLIP4Clip meanP (Table 1)", [*SIGLIP, *INFONCE, *MP, *FRAME_ONLY], "MP_F",
         (46.2, 71.9, 81.6, .633)),
        ("SigLIP4Clip seqTransf (Table 1)",
         [*SIGLIP, *INFONCE, *MP, *VIDEO_ONLY, *NO_EXPANSION], "MP_V",
         (45.7, 71.0, 80.0, .623))]),
    5: ("Table 5: query augmentation", [
        ("off", NO_AUGMENTATION, "MMS_FV", (45.3, 72.5, 82.0, .631)),
        ("on", [], "MMS_FV", MAIN),
        ("SigLIP, off", [*SIGLIP, *NO_AUGMENTATION], "MMS_FV", (51.0, 75.9, 85.1, .675)),
        ("SigLIP, on", SIGLIP, "MMS_FV", (51.5, 76.3, 85.5, .677))]),
    7: ("Table 7: frames", [
        ("4 frames", ["--num-frames", "4"], "MMS_FV", (45.2, 70.7, 80.7, .622)),
        ("12 frames", ["--num-frames", "12"], "MMS_FV", MAIN),
        ("20 frames", ["--num-frames", "20"], "MMS_FV", (48.4, 74.8, 83.4, .652))]),
    8: ("Table 8: temporal layers", [
        ("2 layers", ["--temporal-layers", "2"], "MMS_FV", (47.0, 74.0, 82.3, .642)),
        ("4 layers", ["--temporal-layers", "4"], "MMS_FV", MAIN),
        ("8 layers", ["--temporal-layers", "8"], "MMS_FV", (48.5, 74.1, 82.6, .650))]),
    12: ("Table 12: pad token", [
        ("pad 31", ["--pad-token", "31"], "MMS_FV", (46.0, 74.6, 83.3, .644)),
        ("pad 49407", ["--pad-token", "49407"], "MMS_FV", (46.0, 73.3, 82.3, .638)),
        ("pad 3002", ["--pad-token", "3002"], "MMS_FV", (47.8, 74.6, 83.6, .652)),
        ("pad 13530", ["--pad-token", "13530"], "MMS_FV", (47.9, 72.8, 83.5, .646)),
        ("pad 49406", ["--pad-token", "49406"], "MMS_FV", (48.0, 74.3, 84.0, .653)),
        ("pad 0", ["--pad-token", "0"], "MMS_FV", MAIN)]),
}
# The flags with which the names of a table's rows would be untrue.
COMPARED = {3: ("--interaction", "--loss-form", "--lambda-frame", "--lambda-video"),
            4: ("--loss", "--loss-form", "--lambda-frame", "--lambda-video"),
            5: ("--no-query-augmentation",)}
# Tables 1 and 2
BACKBONES = {
    "ViT-B-32-quickgelu": {
        "msrvtt": MAIN, "msvd": (46.0, 75.0, 84.0, .645), "vatex": (61.8, 90.8, 95.7, .794),
        "didemo": (48.2, 75.1, 83.7, .654), "activitynet": (45.5, 74.6, 85.5, .645)},
    "ViT-B-16-quickgelu": {
        "msrvtt": (51.0, 77.1, 85.5, .677), "msvd": (50.2, 79.6, 87.8, .683),
        "vatex": (66.8, 92.9, 96.8, .826), "didemo": (51.9, 78.3, 85.6, .682),
        "activitynet": (50.6, 78.0, 87.9, .685)},
    "ViT-B-16-SigLIP": {
        "msrvtt": (51.5, 76.3, 85.5, .677), "msvd": (55.2, 82.9, 89.4, .724),
        "vatex": (68.0, 93.4, 96.9, .833), "didemo": (51.7, 76.1, 84.8, .675),
        "activitynet": (45.8, 76.3, 86.7, .656)}}
# Table 11: indexing and query on an RTX A5000, ms
COST = {"MMS_F": "8.90 / 11.1 / 44.3", "MMS_V": "9.64 / 11.1 / 47.0",
        "MMS_FV": "9.64 / 11.2 / 48.1"}

def show(metric, values):
    """The mean of a metric and, if there are several values, their standard deviation."""
    digits = 3 if metric == "nDCG@10" else 1
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text

def quote(numbers):
    """The paper's numbers as one cell."""
    cells = ["–" if x is None else show(name, [x]) for name, x in zip(METRICS, numbers)]
    return " / ".join(cells)

def markdown(header, rows):
    lines = []
    for row in [header, ["---"] * len(header), *rows]:
        # A caption may hold what would end a cell or a row.
        cells = [" ".join(str(cell).split()).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
