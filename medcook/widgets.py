"""Things to play with in a live notebook. Each has a static twin in `medcook.plots`, which readers on the web see."""

import io
from collections.abc import Callable, Mapping, Sequence

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from medcook.architectures import seen_figure
from medcook.data import Case
from medcook.data.intensity import window as ct_window
from medcook.data.manifests import Manifest
from medcook.domain_figures import scanner_view
from medcook.domains import Look
from medcook.fair_figures import threshold_view
from medcook.few_shot.supports import support_view
from medcook.film import Film, draw_frame, error_handles
from medcook.findings_figures import Diagnosed, diagnosed_figure
from medcook.handover import handover_view
from medcook.imperfect_figures import noise_view
from medcook.language_figures import answered, answers_figure
from medcook.metrics import dice
from medcook.plots import as_slices, show_slice
from medcook.pretraining_figures import alike_figure
from medcook.shape_figures import covered_figure
from medcook.synthesis_figures import noise_figure
from medcook.volumes import AXES, most_wrong, plane_view


def slice_viewer(case: Case, manifest: Manifest, prediction: np.ndarray | None = None) -> widgets.VBox:
    """Move through a case's slices, show or hide the outlines, change the window of grey values."""
    images, labels = as_slices(case), as_slices(case, case.label)
    guesses = None if prediction is None else as_slices(case, prediction)
    low, high = (float(value) for value in np.percentile(images, [0.5, 99.5]))
    slider = widgets.IntSlider(len(images) // 2, 0, len(images) - 1, description="slice", continuous_update=True)
    outlines = widgets.Checkbox(True, description="outlines", indent=False)
    window = widgets.FloatRangeSlider(
        value=(low, high), min=low, max=high, step=(high - low) / 100, description="grey values", readout_format=".3g"
    )

    def draw(number: int, outlined: bool, limits: tuple[float, float]) -> Figure:
        panels = [("reference", labels)] if guesses is None else [("reference", labels), ("prediction", guesses)]
        figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
        for position, (name, maps) in enumerate(panels, start=1):
            axes = figure.add_subplot(1, len(panels), position)
            shown = np.clip(images[number], *limits)
            show_slice(axes, shown, maps[number] if outlined else None, title=f"{case.case_id}, slice {number}: {name}")
        return figure

    return live(draw, slider, outlines, window)


def window_viewer(plane: np.ndarray, *, aspect: float = 1.0) -> widgets.VBox:
    """Move level and width of the window through which a CT slice (H, W), in Hounsfield units, is seen."""
    level = widgets.IntSlider(40, -1000, 1500, step=10, description="level, HU")
    width = widgets.IntSlider(400, 20, 3000, step=20, description="width, HU")

    def draw(level: int, width: int) -> Figure:
        figure = Figure(figsize=(4.5, 4.5), layout="constrained")
        seen = ct_window(plane, level, width)
        title = f"black below {level - width // 2} HU, white above {level + width // 2} HU"
        show_slice(figure.add_subplot(), seen, title=title, limits=(0, 1), aspect=aspect)
        return figure

    return live(draw, level, width)


def film_viewer(film: Film) -> widgets.VBox:
    """Watch the pseudo-label of an image change while the training goes on; errors are filled (see `film.strip`)."""
    frame = widgets.SelectionSlider(options=[(f"step {s}", k) for k, s in enumerate(film.steps)], description="after")
    number = widgets.IntSlider(film.most_biased(), 0, len(film.images) - 1, description="image")

    def draw(frame: int, number: int) -> Figure:
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        truth, guess = figure.subplots(1, 2)
        show_slice(truth, film.images[number, 0].numpy(), film.labels[number].numpy(), title="hidden truth")
        draw_frame(guess, film, number, frame)
        figure.legend(handles=error_handles(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        return figure

    return live(draw, frame, number)


def handover_slider(frame: pd.DataFrame, dataset: str, arm: str | None = None) -> widgets.VBox:
    """Move the share of the cases that a person looks at, and see what is left of the error (see `handover_view`)."""
    arms = list(dict.fromkeys(frame["arm"]))
    share = widgets.FloatSlider(0.1, min=0, max=0.9, step=0.02, description="handed over", readout_format=".0%")
    which = widgets.Dropdown(options=arms, value=arm or arms[0], description="method")
    return live(lambda share, name: handover_view(frame, name, share, dataset), share, which)


def threshold_explorer(frame: pd.DataFrame, dataset: str, attributes: Sequence[str]) -> widgets.VBox:
    """Choose a model, an attribute and the threshold; see sensitivity and specificity of each group (`threshold_view`).

    frame  columns arm, replicate, score, outcome and the attributes
    """
    arms = list(dict.fromkeys(frame["arm"]))
    which = widgets.Dropdown(options=arms, description="model")
    attribute = widgets.Dropdown(options=list(attributes), description="groups by")
    threshold = widgets.FloatSlider(0.5, min=0, max=1, step=0.02, description="threshold")

    def draw(arm: str, by: str, level: float) -> Figure:
        return threshold_view(frame[frame["arm"] == arm], by, level, dataset)

    return live(draw, which, attribute, threshold)


def support_picker(fitted, cases: Sequence[Case], supports: int = 6) -> widgets.VBox:
    """Choose whose annotation is the support, and see the answer for a case change (see `support_view`)."""
    structures = [(name, value) for value, name in fitted.task.novel_structures.items()]
    which = widgets.Dropdown(options=structures, description="structure")
    number = widgets.Dropdown(description="support")
    case = widgets.Dropdown(options=[(case.case_id, k) for k, case in enumerate(cases)], description="case")

    def name_patients(_=None) -> None:
        kept = number.value
        patients = [" ".join(c.patient_id for c in fitted.task.support_cases(k, which.value)) for k in range(supports)]
        number.options = list(zip(patients, range(supports), strict=True))
        number.value = kept or 0

    name_patients()
    which.observe(name_patients, names="value")
    return live(lambda value, k, chosen: support_view(fitted, cases[chosen], value, k), which, number, case)


def seen_explorer(networks: Mapping[str, nn.Module], images: Tensor, credit: str) -> widgets.VBox:
    """Choose a network, an image of (N, C, H, W) and a pixel; see what the answer there depends on (`seen_figure`)."""
    height, width = images.shape[2:]
    which = widgets.Dropdown(options=list(networks), description="network")
    number = widgets.IntSlider(0, 0, len(images) - 1, description="image")
    row = widgets.IntSlider(height // 2, 0, height - 1, description="row")
    column = widgets.IntSlider(width // 2, 0, width - 1, description="column")

    def draw(name: str, number: int, row: int, column: int) -> Figure:
        return seen_figure({name: networks[name]}, images[number : number + 1], (row, column), credit)

    return live(draw, which, number, row, column)


def plane_explorer(case: Case, answers: Mapping[str, np.ndarray], manifest: Manifest) -> widgets.VBox:
    """Choose an answer, the axis across which to look, and a slice; see it beside the reference (see `plane_view`)."""
    start = most_wrong(case, answers.values())
    which = widgets.Dropdown(options=list(answers), description="answer")
    axis = widgets.Dropdown(options=[(name, place) for place, name in enumerate(AXES)], description="across axis")
    number = widgets.IntSlider(start[0], 0, case.label.shape[0] - 1, description="slice")

    def limit(_=None) -> None:
        number.max = case.label.shape[axis.value] - 1
        number.value = start[axis.value]

    axis.observe(limit, names="value")
    return live(lambda name, a, k: plane_view(case, answers[name], a, k, manifest, name), which, axis, number)


def noise_explorer(image: np.ndarray, label: np.ndarray, manifest: Manifest) -> widgets.VBox:
    """Choose a kind of mistake and how much of it, and see what becomes of a label (H, W) (see `noise_view`)."""
    kind = widgets.Dropdown(options=["borders", "regions"], description="mistakes")
    amount = widgets.FloatSlider(0.3, min=0, max=0.8, step=0.05, description="amount")
    draw = widgets.IntSlider(0, 0, 9, description="annotator")
    return live(lambda how, much, who: noise_view(image, label, how, much, who, manifest), kind, amount, draw)


def scanner_explorer(fitted, image: Tensor, label: np.ndarray, manifest: Manifest) -> widgets.VBox:
    """Build a scanner and watch a network (a `Fitted`) that never saw it read a prepared slice (H, W)."""
    names = {
        "contrast": (1.0, -1.0, 1.0),
        "blur": (0.0, 0.0, 4.0),
        "shading": (0.0, 0.0, 1.0),
        "noise": (0.0, 0.0, 2.0),
    }
    sliders = [
        widgets.FloatSlider(start, min=low, max=high, step=(high - low) / 20, description=name)
        for name, (start, low, high) in names.items()
    ]

    def draw(tilt: float, blur: float, shade: float, noise: float) -> Figure:
        return scanner_view(fitted, image, label, Look(blur=blur, shade=shade, noise=noise), tilt, manifest)

    return live(draw, *sliders)


def hiding_explorer(
    fitted: Mapping, image: np.ndarray, mask: np.ndarray, manifest: Manifest, side: float = 0.375
) -> widgets.VBox:
    """Move a square that hides a part of a prepared image (H, W), and see what networks ({name: Fitted}) make of it.

    mask  (H, W) bool: what is true; `side` is the square's, as a share of the image's
    """
    height, width = (max(1, round(side * n)) for n in image.shape)
    row = widgets.IntSlider(image.shape[0] // 3, 0, image.shape[0] - height, description="row")
    column = widgets.IntSlider(image.shape[1] // 5, 0, image.shape[1] - width, description="column")

    def draw(y: int, x: int) -> Figure:
        seen = torch.from_numpy(image).clone()
        seen[y : y + height, x : x + width] = seen.min()
        answers = {name: (net.answer(seen[None, None])[0].argmax(0) > 0).numpy() for name, net in fitted.items()}
        titled = {f"{name}: Dice {dice(answer, mask):.2f}": answer for name, answer in answers.items()}
        return covered_figure(seen.numpy(), mask, titled, manifest)

    return live(draw, row, column)


def neighbour_explorer(
    networks: Mapping[str, Tensor], images: Tensor, case_of: Tensor, manifest: Manifest
) -> widgets.VBox:
    """Choose a slice of (N, 1, H, W), and see which slices of others a network finds like it (see `alike_figure`)."""
    which = widgets.Dropdown(options=list(networks), description="network")
    number = widgets.IntSlider(len(images) // 2, 0, len(images) - 1, description="slice")
    return live(lambda name, k: alike_figure({name: networks[name]}, images, case_of, k, manifest), which, number)


def diffusion_explorer(diffusion, nets: Mapping[str, Callable], image: Tensor, manifest: Manifest) -> widgets.VBox:
    """Choose how much noise an image (1, 1, H, W) drowns in, and see what a network finds in it (`noise_figure`)."""
    which = widgets.Dropdown(options=list(nets), description="network")
    time = widgets.IntSlider(diffusion.times // 2, 0, diffusion.times - 1, description="t")
    draw = widgets.IntSlider(0, 0, 9, description="noise")
    return live(lambda name, t, k: noise_figure(diffusion, nets[name], image, t, k, manifest), which, time, draw)


def question_explorer(method, nets: nn.ModuleDict, samples, manifest: Manifest, choices: Mapping, ask) -> widgets.VBox:
    """Choose an image of `samples` and the words of a question, and see what a network answers.

    choices  {what a word tells: the words to choose from}; the first stands for saying nothing about it
    ask      (**words) -> `medcook.language.Question`
    """
    number = widgets.IntSlider(0, 0, len(samples) - 1, description="image")
    menus = [widgets.Dropdown(options=list(words), description=name) for name, words in choices.items()]

    def draw(k: int, *chosen: str) -> Figure:
        said = {
            name: word for (name, words), word in zip(choices.items(), chosen, strict=True) if word != next(iter(words))
        }
        shown = answered(method, nets, samples.images[k], samples.labels[k], [ask(**said)])
        return answers_figure([shown], manifest)

    return live(draw, number, *menus)


def nodule_explorer(scores: Mapping[str, Callable], paint: Callable, images: int, manifest: Manifest) -> widgets.VBox:
    """Draw a nodule as smooth or as malignant as you like into one of some images, and see what everyone thinks of it.

    scores  {who: (images (1, C, H, W), labels (1, H, W)) -> probabilities (1,)}
    paint   (number of the image, degree 0 to 1, radius) -> image (C, H, W) and label (H, W)
    """
    number = widgets.IntSlider(0, 0, images - 1, description="image")
    degree = widgets.FloatSlider(0.5, min=0, max=1, step=0.1, description="spicules")
    radius = widgets.FloatSlider(4.5, min=2.5, max=7, step=0.5, description="radius")

    def draw(k: int, how_malignant: float, size: float) -> Figure:
        image, label = paint(k, how_malignant, size)
        thought = {name: float(score(image[None], label[None])[0]) for name, score in scores.items()}
        shown = Diagnosed(image[0].numpy(), label.numpy() > 0, f"drawn: {how_malignant:.1f} of 1", thought)
        return diagnosed_figure([shown], manifest)

    return live(draw, number, degree, radius)


def live(draw: Callable[..., Figure], *controls: widgets.ValueWidget) -> widgets.VBox:
    """The controls above an image that is drawn anew, by `draw(*values)`, whenever one of them moves."""
    natural_size = widgets.Layout(align_self="flex-start", max_width="100%")
    image = widgets.Image(format="png", layout=natural_size)

    def update(_=None) -> None:
        buffer = io.BytesIO()
        draw(*(control.value for control in controls)).savefig(buffer, format="png", dpi=90)
        image.value = buffer.getvalue()

    for control in controls:
        control.observe(update, names="value")
    update()
    return widgets.VBox([widgets.HBox(controls), image])
