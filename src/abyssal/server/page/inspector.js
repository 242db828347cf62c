// The panel that shows an answer a token at a time.

const byId = (id) => document.getElementById(id);
const MOST_CELLS = 64; // experts of a layer that are drawn as a row of cells; more are named by number

/** Whitespace that would not be seen, made visible. */
function visible(text) {
  return text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
}

function percent(share) {
  return share >= 0.0995 ? `${(100 * share).toFixed(1)} %` : `${(100 * share).toPrecision(2)} %`;
}

export class Inspector {
  #message = null;
  #shown = 0;
  #selected = -1;
  #about = { num_experts: 0, first_expert_layer: 0, num_mtp_modules: 0 };

  constructor() {
    byId("close-inspector").addEventListener("click", () => this.close());
    byId("previous").addEventListener("click", () => this.#select(this.#selected - 1));
    byId("next").addEventListener("click", () => this.#select(this.#selected + 1));
    byId("tokens").addEventListener("click", (event) => {
      const chip = event.target.closest(".token");
      if (chip) this.#select([...byId("tokens").children].indexOf(chip));
    });
    byId("inspector").addEventListener("keydown", (event) => this.#key(event));
  }

  /** Tell what the model is made of. */
  describe(about) {
    this.#about = about;
  }

  get message() {
    return this.#message;
  }

  open(message) {
    this.#message = message;
    this.#shown = 0;
    this.#selected = -1;
    byId("tokens").replaceChildren();
    byId("token").hidden = true;
    byId("inspector").hidden = false;
    document.body.classList.add("inspecting");
    this.update();
    this.#select(0);
    byId("tokens").focus({ preventScroll: true });
  }

  close() {
    this.#message = null;
    byId("inspector").hidden = true;
    document.body.classList.remove("inspecting");
  }

  /** Show the tokens that came since. */
  update() {
    if (!this.#message) return;
    const tokens = this.#message.tokens;
    byId("tokens").append(...tokens.slice(this.#shown).map((token) => this.#chip(token)));
    this.#shown = tokens.length;
    this.#totals(tokens);
    if (this.#selected < 0) this.#select(0);
    else this.#place();
  }

  #chip(token) {
    const chip = document.createElement("span");
    chip.className = `token p${Math.min(Math.floor(token.probability * 10), 9)}`;
    if (token.draft) chip.classList.add(token.draft.accepted ? "accepted" : "rejected");
    chip.setAttribute("role", "option");
    chip.textContent = visible(token.text) || "∅";
    return chip;
  }

  #totals(tokens) {
    const drafted = tokens.filter((token) => token.draft);
    const accepted = drafted.filter((token) => token.draft.accepted);
    const surprise = tokens.reduce((sum, token) => sum - Math.log2(Math.max(token.probability, 1e-30)), 0);
    const parts = [`${tokens.length} tokens`];
    if (tokens.length) parts.push(`${(surprise / tokens.length).toFixed(2)} bits each`);
    if (drafted.length) parts.push(`${accepted.length} of ${drafted.length} drafts accepted`);
    else if (this.#about.num_mtp_modules) parts.push("no drafts made");
    byId("totals").textContent = parts.join(" · ");
  }

  #select(index) {
    const tokens = this.#message.tokens;
    if (index < 0 || index >= tokens.length) return;
    const chips = byId("tokens").children;
    chips[this.#selected]?.setAttribute("aria-selected", "false");
    this.#selected = index;
    chips[index].setAttribute("aria-selected", "true");
    chips[index].scrollIntoView({ block: "nearest" });
    this.#describe(tokens[index]);
  }

  #place() {
    const count = this.#message.tokens.length;
    byId("position").textContent = `token ${this.#selected + 1} of ${count}`;
    byId("previous").disabled = this.#selected <= 0;
    byId("next").disabled = this.#selected >= count - 1;
  }

  #describe(token) {
    this.#place();
    byId("token").hidden = false;
    byId("token-text").textContent = visible(token.text) || "(an end token, or part of a character)";
    byId("token-id").textContent = token.id;
    byId("meter").value = token.probability;
    byId("probability").textContent = percent(token.probability);
    byId("draft").textContent = this.#drafted(token);
    this.#experts(token.experts);
  }

  #drafted(token) {
    if (!token.draft) return "none: the main model computed a pass of its own for it";
    if (token.draft.accepted) return "drafted by MTP and accepted";
    return `MTP drafted “${visible(token.draft.text)}”: rejected`;
  }

  #experts(layers) {
    const count = this.#about.num_experts;
    const rows = layers.map((experts, place) => {
      const row = document.createElement("div");
      const name = document.createElement("span");
      name.textContent = this.#about.first_expert_layer + place;
      row.append(name);
      if (count > MOST_CELLS) row.append(experts.join(", "));
      else row.append(...Array.from({ length: count }, (_, expert) => this.#cell(expert, experts.indexOf(expert))));
      return row;
    });
    byId("experts").replaceChildren(...rows);
    byId("experts-note").textContent = layers.length
      ? `A row for each layer with experts, a cell for each of its ${count}; stronger colour, more weight.`
      : "not recorded";
  }

  #cell(expert, rank) {
    const cell = document.createElement("i");
    if (rank >= 0) cell.className = rank === 0 ? "first" : rank < 3 ? "second" : "further";
    cell.title = rank >= 0 ? `expert ${expert}, number ${rank + 1} by weight` : `expert ${expert}`;
    return cell;
  }

  #key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.close();
    else if (step) this.#select(this.#selected + step);
    else return;
    event.preventDefault();
  }
}
