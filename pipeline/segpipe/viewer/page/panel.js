// The controls beside the image. Text of files is only ever set as text: a name may hold anything.

export const find = (id) => document.getElementById(id);

/** A new element with these properties, in order, and these children. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** How many objects an image has, or classes where its labels are those. */
export function countOf({ objects, classes }) {
  const [one, more] = classes.length ? ["class", "classes"] : ["object", "objects"];
  return `${objects.toLocaleString("en")} ${objects === 1 ? one : more}`;
}

/** The list of images; `chosen(key)` is called on a click. */
export function showList(slides, chosen) {
  const words = { done: "", failed: "failed", unfinished: "not finished" };
  find("list").replaceChildren(
    ...slides.map((slide) => {
      const button = make("button", { onclick: () => chosen(slide.key) });
      button.dataset.key = slide.key;
      if (slide.shown)
        button.append(make("img", { loading: "lazy", alt: "", src: `slides/${slide.key}/thumbnail.png` }));
      const count = slide.objects === null ? "" : countOf(slide);
      const told = [words[slide.status], count, slide.error].filter(Boolean).join(" · ");
      button.append(make("div", { textContent: slide.name }), make("small", { textContent: told }));
      return make("li", { className: slide.status }, button);
    }),
  );
}

/** Marks one image of the list as the one that is shown. */
export function markCurrent(key) {
  for (const button of find("list").querySelectorAll("button")) {
    button.setAttribute("aria-current", String(button.dataset.key === key));
    if (button.dataset.key === key) button.scrollIntoView({ block: "nearest" });
  }
}

/** Hides what does not have `text` in its name. */
export function filterList(text) {
  for (const item of find("list").children)
    item.hidden = !item.textContent.toLowerCase().includes(text.toLowerCase());
}

/** Switch, colour and contrast of each channel; changes them and calls `changed`. */
export function showChannels(channels, isFloat, changed) {
  find("channels").replaceChildren(
    ...channels.map((channel) => {
      const set = (values) => {
        Object.assign(channel, values);
        changed();
      };
      const active = make("input", { type: "checkbox", checked: channel.active });
      active.onchange = () => set({ active: active.checked });
      const colour = make("input", { type: "color", value: channel.colour.toLowerCase(), title: "colour" });
      colour.oninput = () => set({ colour: colour.value });
      const name = make("span", { className: "name", textContent: channel.label });
      return make(
        "div",
        { className: "channel" },
        make("div", { className: "wide" }, make("label", {}, active), name, colour),
        ...["low", "high"].map((end) => contrast(channel, end, isFloat, set)),
      );
    }),
  );
}

/** A slider and a number for one end of a channel's range. */
function contrast(channel, end, isFloat, set) {
  const most = Math.max(channel.most, channel.high);
  const range = { min: Math.min(channel.least, channel.low), max: most, step: isFloat ? "any" : 1 };
  const slider = make("input", { type: "range", ...range, value: channel[end], title: end });
  const number = make("input", { type: "number", step: "any", value: Number(channel[end].toPrecision(6)) });
  const take = (value, other) => {
    if (!Number.isFinite(value)) return;
    other.value = value;
    set({ [end]: value });
  };
  slider.oninput = () => take(slider.valueAsNumber, number);
  number.onchange = () => take(number.valueAsNumber, slider);
  return make("label", { className: "wide" }, end, slider, number);
}

/** The row of an object, or a line that says why there is none. */
export function showRow(row, hint = "") {
  find("hint").textContent = hint;
  const text = (value) => {
    if (value === null) return "not known";
    if (typeof value !== "number") return value === true ? "yes" : value === false ? "no" : String(value);
    return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(6)));
  };
  find("row").replaceChildren(
    ...Object.entries(row ?? {}).map(([name, value]) =>
      make("tr", {}, make("th", { textContent: name }), make("td", { textContent: text(value) })),
    ),
  );
}

/** A line over the image; none hides it. */
export function say(text = "") {
  find("message").textContent = text;
  find("message").hidden = !text;
}

/** A bar of a round length, at most `longest` screen pixels: { width, text }. */
export function scaleBar(pixelsPerUnit, unit, longest = 160) {
  const most = longest / pixelsPerUnit;
  const power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].find((n) => n * power <= most) * power;
  const [shown, name] = unit === "um" && length >= 1000 ? [length / 1000, "mm"] : [length, unit];
  return { width: length * pixelsPerUnit, text: `${Number(shown.toPrecision(3))} ${name.replace("um", "\u00b5m")}` };
}
