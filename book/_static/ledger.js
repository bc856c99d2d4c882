// The ledger: click a heading to sort, choose or type to filter. Without JavaScript it is a plain table.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.getElementById("ledger");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  const text = (row, column) => row.cells[column].textContent.trim();

  const tools = document.createElement("div");
  tools.className = "ledger-tools";
  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "Find in the ledger";
  search.setAttribute("aria-label", search.placeholder);
  tools.append(search);
  const count = document.createElement("div");
  count.className = "ledger-count";
  count.setAttribute("aria-live", "polite");

  const choices = [];
  headings.forEach((heading, column) => {
    if (!("filter" in heading.dataset)) return;
    const select = document.createElement("select");
    const name = heading.textContent.trim();
    select.name = name;
    select.setAttribute("aria-label", name);
    select.append(new Option(`any ${name}`, ""));
    const values = [...new Set(rows.map((row) => text(row, column)))].filter((value) => value !== "–").sort();
    values.forEach((value) => select.append(new Option(value, value)));
    choices.push({ select, column });
    tools.append(select);
  });
  tools.append(count);
  table.parentElement.before(tools);

  function filter() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const chosen = choices.every(({ select, column }) => !select.value || text(row, column) === select.value);
      const content = row.textContent.toLowerCase();
      row.hidden = !(chosen && wanted.every((word) => content.includes(word)));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }

  // Rows without a value come last, whichever way the others are sorted.
  function compare(column, numeric, sign) {
    const value = (row) => (numeric ? row.cells[column].dataset.value : text(row, column).replace("–", ""));
    return (a, b) => {
      const [one, other] = [value(a), value(b)];
      if (!one || !other) return !one - !other;
      return sign * (numeric ? one - other : one.localeCompare(other));
    };
  }

  function sort(heading, column) {
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    rows.sort(compare(column, "number" in heading.dataset, sign));
    body.append(...rows);
  }

  headings.forEach((heading, column) => {
    heading.dataset.sortable = "";
    heading.tabIndex = 0;
    heading.addEventListener("click", () => sort(heading, column));
    heading.addEventListener("keydown", (event) => event.key === "Enter" && sort(heading, column));
  });
  tools.addEventListener("input", filter);

  const asked = new URLSearchParams(location.search); // ledger.html?chapter=04+semi+supervised&verdict=supported
  choices.forEach(({ select }) => (select.value = asked.get(select.name) ?? ""));
  search.value = asked.get("find") ?? "";
  filter();
});
