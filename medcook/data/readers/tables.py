"""Tables of texts: CSV files, and those with tabs."""

from pathlib import Path

import pandas as pd

from medcook.data.readers.damage import readable
from medcook.errors import MedcookError


def read_table(path: Path, names: dict[str, str], hint: str) -> pd.DataFrame:
    """The columns `names` of a table (.txt: with tabs), all as texts; {a column there: what it is called here}.

    MedcookError where the file is damaged, or a column is missing.
    """
    with readable(path, "table", hint, quoting=False):
        separator = "\t" if path.suffix == ".txt" else ","
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    if missing := [column for column in names if column not in table]:
        raise MedcookError(f"{path}: no column {missing[0]!r}.", hint)
    return table[[*names]].rename(columns=names)
