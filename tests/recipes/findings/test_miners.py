"""Four small models that are asked as a service would be: how they answer, and what they learn."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_up_xrays import SIZE, known, lungs, xrays
from sklearn.linear_model import Ridge

from medcook.methods import Batch, Moment
from medcook.networks.vila import IMAGE
from medcook.recipes.findings import _mined as mined
from medcook.recipes.findings import _miners as miners
from medcook.recipes.findings import _writing as writing
from medcook.recipes.findings._harness import Question, judge
from medcook.recipes.findings._mined import KINDS, PLACES, Known
from medcook.recipes.findings._miners import Nearest, Probe, Segmenter, Writer

TINY = {kind: kind(encoder="random", channels=(4, 8)) for kind in (Writer, Segmenter, Probe, Nearest)}


def batch() -> Batch:
    return Batch(xrays(2), torch.tensor([0, 1]).byte()[:, None, None].expand(-1, 48, 48))


def stand_in(method) -> SimpleNamespace:
    """A run that has learnt nothing."""
    torch.manual_seed(0)
    nets = method.build(2, 2, 2)
    return SimpleNamespace(method=method, nets=nets, weights={"last": nets.state_dict()})


def questions(some: Known, number: int) -> dict[str, Question]:
    return {kind: mined.asked(kind, some.images[number, 0].numpy(), some.reports[number]) for kind in KINDS}


@torch.no_grad()
def answered(method, some: Known, number: int = 0) -> dict[str, str]:
    model = method.model(stand_in(method), some)
    return {kind: model(question) for kind, question in questions(some, number).items()}


class TestModels:
    def test_the_nearest_case_of_a_known_image_is_itself(self):
        some = known()
        for number in (3, 8):
            for kind, text in answered(TINY[Nearest], some, number).items():
                assert KINDS[kind].score(KINDS[kind].parse(text, SIZE), some.truths[number][kind]) > 0.97

    def test_the_nearest_case_that_has_an_answer_is_taken(self):
        """Case 1 is healthy, and looks as case 0: it speaks where that has nothing to say."""
        some = known()
        some.images[1] = some.images[0]
        assert answered(TINY[Nearest], some)["detection"] == "right"
        del some.truths[0]["detection"]
        assert answered(TINY[Nearest], some)["detection"] == "none"

    def test_a_ridge_is_that_of_scikit_learn(self):
        rng = np.random.default_rng(0)
        x, y, new = rng.normal(size=(30, 5)) + 2, rng.normal(size=(30, 3)), rng.normal(size=5)
        np.testing.assert_allclose(miners.ridge(x, y, 7.0)(new), Ridge(7.0).fit(x, y).predict(new[None])[0])

    @torch.no_grad()
    def test_a_linear_map_tells_everything_that_is_known(self, monkeypatch):
        monkeypatch.setattr(miners, "ridge", lambda x, y, weight=0.1, fit=miners.ridge: fit(x, y, 0.1))
        some, right = known(40), {kind: 0.0 for kind in KINDS}
        model = TINY[Probe].model(stand_in(TINY[Probe]), some)
        for number in range(0, 40, 5):
            for kind, question in questions(some, number).items():
                value = KINDS[kind].parse(model(question), SIZE)
                right[kind] += KINDS[kind].score(value, some.truths[number][kind]) / 8
        chance = mined.chances(some)
        assert all(right[kind] > 0.5 + chance[kind] / 2 for kind in KINDS if kind not in ("classification", *PLACES)), (
            right
        )
        assert right["localisation"] > chance["localisation"] and right["segmentation"] > 0.8

    def test_its_classification_is_what_training_taught_it(self, monkeypatch):
        for probability, wanted in ((0.9, "yes"), (0.2, "no")):
            monkeypatch.setattr(Probe, "outcomes", lambda self, nets, images, p=probability: torch.tensor([p]))
            assert answered(TINY[Probe], known())["classification"] == wanted

    def test_frozen_eyes_stay(self):
        nets = stand_in(TINY[Probe]).nets
        TINY[Probe].training_step(nets, batch(), None, Moment(0, 9)).backward()
        assert all(p.grad is None for p in nets["model"].encoder.parameters())
        assert all(p.grad is not None for p in nets["model"].head.parameters())

    @torch.no_grad()
    def test_a_segmenter_draws_what_it_finds_and_says_what_is_usual(self, monkeypatch):
        some, method = known(), TINY[Segmenter]
        run = stand_in(method)
        found = torch.from_numpy(lungs(bottom=36))
        monkeypatch.setattr(run.nets["average"], "lungs", lambda images: torch.stack([~found, found]).float()[None])
        for probability, number in ((0.9, 0), (0.2, 1)):
            monkeypatch.setattr(Segmenter, "outcomes", lambda self, nets, images, p=probability: torch.tensor([p]))
            model = method.model(run, some)
            for kind, question in questions(some, 1).items():
                if kind == "mining":
                    assert judge(model, KINDS[kind], question, frozenset()).status == "refused"
                    continue
                truth = some.truths[0 if kind in PLACES else number][kind]
                assert judge(model, KINDS[kind], question, truth).score > 0.97, kind
        monkeypatch.setattr(run.nets["average"], "lungs", lambda images: torch.stack([found, found]).float()[None] * 0)
        assert judge(model, KINDS["localisation"], questions(some, 1)["localisation"], None).status == "malformed"

    @pytest.mark.parametrize("mixed", [False, True])
    @pytest.mark.parametrize("kind, unheard", [(Writer, ("head.", "post_layernorm", "layers.2")), (Segmenter, ())])
    def test_what_the_parts_learn(self, kind, unheard, mixed):
        nets = stand_in(TINY[kind]).nets
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = TINY[kind].training_step(nets, batch(), None, Moment(0, 9))
        loss.backward()
        weights = nets["model"].named_parameters()
        still = [name for name, p in weights if p.grad is None or not p.grad.isfinite().all()]
        assert loss.dtype == torch.float32 and all(any(part in name for part in unheard) for name in still), still

    def test_a_writer_learns_all_answers_and_nothing_else(self, monkeypatch):
        kept = {}

        def loss(self, lines, told, pictures):
            kept.update(lines=lines, told=told, pictures=pictures)
            return pictures.sum()

        monkeypatch.setattr(miners.Vila, "loss", loss)
        monkeypatch.setattr(miners, "said", lambda groups: ("normal", "RUL infiltrate"))
        TINY[Writer].training_step(
            stand_in(TINY[Writer]).nets, batch()._replace(groups=torch.zeros(2)), None, Moment(0, 9)
        )
        assert len(kept["lines"]) == 2 * len(KINDS) and len(kept["pictures"]) == sum(
            line.count(IMAGE) for line in kept["lines"]
        )
        for line, told in zip(kept["lines"], kept["told"], strict=True):
            first = told.index(True)
            assert all(told[first:]) and line[-1] == writing.STOP and line[:first].count(IMAGE) <= 1
        words = [
            [writing.WORDS[t] for t, mine in zip(*row, strict=True) if mine and t < writing.READ]
            for row in zip(kept["lines"], kept["told"], strict=True)
        ]
        assert words[0] == ["no"] and words[7] == ["yes"] and words[13] == ["right", "upper", "infiltrate"] == words[12]

    @torch.no_grad()
    def test_it_writes_until_it_stops(self, monkeypatch):
        tokens = [writing.WORDS.index(word) for word in ("right", "upper")]
        script = iter([*tokens, writing.STOP, *[tokens[0]] * 99])
        monkeypatch.setattr(
            miners.Vila, "next_words", lambda self, lines, pictures: torch.eye(1 + writing.STOP)[[next(script)]]
        )
        model = TINY[Writer].model(stand_in(TINY[Writer]), known())
        asked = questions(known(), 0)
        assert model(asked["mining"]) == "right, upper"
        assert len(model(asked["generation"]).split()) == writing.MOST

    @torch.no_grad()
    def test_it_reads_without_an_image_and_looks_without_a_report(self):
        run = stand_in(TINY[Writer])
        net, rng = run.nets.eval()["average"], np.random.default_rng(1)
        model = TINY[Writer].model(run, known())
        image = rng.normal(size=SIZE).astype(np.float32)
        line = writing.heard(Question("detection", "", image))
        pictures = net.pictures(miners.coloured(torch.from_numpy(image)[None, None]))
        first = int(net.next_words([line], pictures).argmax())
        said = model(Question("detection", "", image))
        assert said.split(", ")[0] == (writing.written("detection", [first], SIZE) if first != writing.STOP else "")
        assert isinstance(model(Question("mining", "", None, "PTB")), str)

    def test_predictions_are_probabilities(self):
        for method in TINY.values():
            with torch.no_grad():
                found = method.predict(stand_in(method).nets.eval(), batch().images)
            assert found.shape == (2, 2, 48, 48) and torch.allclose(found.sum(1), torch.ones(2, 48, 48))
