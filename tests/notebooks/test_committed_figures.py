"""The committed evidence figures are what the committed evidence draws."""

from medcook import figures


def test_every_evidence_figure_is_up_to_date():
    assert figures.check() == []
