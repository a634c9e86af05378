
// The table of classes: those whose name contains the text.
const search = byId("class-search");
if (search) {
  const rows = [...document.querySelectorAll("#classes-table tbody tr")];
  const count = byId("class-count");
  const choose = () => {
    const wanted = search.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.dataset.name.toLowerCase().includes(wanted);
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} classes shown`;
  };
  search.addEventListener("input", choose);
  search.closest("form").addEventListener("submit", (event) => event.preventDefault());
  search.closest("form").hidden = false;
  choose();
}
