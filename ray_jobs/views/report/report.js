// Samples: sorted, filtered, and their methods shown or not.
const text = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
const surest = (a, b) => b.dataset.probability - a.dataset.probability || text(a.dataset.key, b.dataset.key);
const isWrong = (card) => Number(card.dataset.right === "no");
const ORDERS = {
  surest,
  unsurest: (a, b) => surest(b, a),
  wrong: (a, b) => isWrong(b) - isWrong(a) || surest(a, b),
  key: (a, b) => text(a.dataset.key, b.dataset.key),
};

function browse(samples) {
  const form = samples.querySelector("form");
  const list = samples.querySelector(".cards");
  const count = samples.querySelector(".count");
  const cards = [...list.children];
  const { sort, text: wanted, right, size, method: methods } = form.elements;

  const choose = () => {
    const part = wanted.value.trim().toLowerCase();
    const named = (card) => [card.dataset.label, card.dataset.prediction].some((name) => name.toLowerCase().includes(part));
    for (const card of cards) card.hidden = !(named(card) && (!right.value || card.dataset.right === right.value));
    count.textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length} samples shown`;
  };
  const order = () => list.append(...cards.sort(ORDERS[sort.value]));
  const toggle = (box) => {
    for (const tile of list.querySelectorAll(`[data-method="${box.value}"]`)) tile.hidden = !box.checked;
  };

  sort.addEventListener("change", order);
  wanted.addEventListener("input", choose);
  right.addEventListener("change", choose);
  size.addEventListener("change", () => { samples.dataset.size = size.value; });
  for (const box of methods) box.addEventListener("change", () => toggle(box));
  form.addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("click", (event) => {
    const button = event.target.closest(".enlarge");
    if (button) enlarge(button.closest(".card"));
  });
  // A browser that goes back to a page fills its forms as they were.
  choose();
  order();
  for (const box of methods) toggle(box);
  samples.dataset.size = size.value;
  form.hidden = false;
}

// One sample, large.
const zoom = byId("zoom");
let enlarged = null;

function enlarge(card) {
  enlarged = card;
  byId("zoom-title").textContent = card.dataset.key;
  const said = card.querySelector(".said").cloneNode(true);
  said.className = "facts";
  byId("zoom-said").replaceChildren(said);
  const tiles = card.querySelector(".tiles").cloneNode(true);
  for (const tile of tiles.children) tile.hidden = false;
  byId("zoom-tiles").replaceChildren(...tiles.children);
  zoom.classList.toggle("exact", card.closest(".samples").classList.contains("exact"));
  if (!zoom.open) zoom.showModal();
}

function step(by) {
  const shown = [...enlarged.parentElement.children].filter((card) => !card.hidden);
  enlarge(shown[(shown.indexOf(enlarged) + by + shown.length) % shown.length]);
}

byId("zoom-close").addEventListener("click", () => zoom.close());
byId("zoom-previous").addEventListener("click", () => step(-1));
byId("zoom-next").addEventListener("click", () => step(1));
zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });
zoom.addEventListener("close", () => enlarged.querySelector(".enlarge").focus());
zoom.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) step(by);
});

for (const samples of document.querySelectorAll(".samples")) browse(samples);
