// The page: a list of images, the one that is looked at, and the state that a link keeps.
//
// Positions in the table, in links and at the lower left are pixels of the full-resolution image, centres
// at integers. The viewer's are edges of pixels of the OME-Zarr, of which one may be several of those:
//
//     full = u * scale - 1/2

import { Drawer, imageLayer, labelLayer, paintsTiles, repaint } from "./layers.js";
import {
  countOf, filterList, find, make, markCurrent, say, scaleBar, showChannels, showList, showRow,
} from "./panel.js";
import { openSlide } from "./pool.js";

const { OpenSeadragon } = window;
const MODES = ["outlines", "filled"];

// Where OpenSeadragon finds this it adds no inline style, which the security policy forbids. Not an
// HTML element: those are checked as well.
const styled = document.createElementNS("urn:none", "style");
styled.setAttribute("data-openseadragon-mobile-css", "");
document.head.append(styled);

const viewer = OpenSeadragon({
  element: find("canvas"),
  drawer: Drawer,
  showNavigationControl: false,
  showNavigator: true,
  navigatorPosition: "TOP_RIGHT",
  navigatorSizeRatio: 0.15,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
  keyboardNavEnabled: false,
  maxZoomPixelRatio: 24,
  visibilityRatio: 0.3,
  animationTime: 0.4,
  blendTime: 0,
  maxImageCacheCount: 160,
  immediateRender: true, // the level that is looked at first: all coarser ones before it are more than it has
  imageLoaderLimit: 6, // as many connections as a browser has to a host: more would wait there, out of order
  maxTilesPerFrame: 4, // to ask for; one, as is usual, makes the asking slower than the reading
  smoothTileEdgesMinZoom: Infinity,
});
paintsTiles(viewer);

const style = { mode: "outlines", selected: 0, palette: [] };
const view = { viewer, style, slide: null, current: null, slides: [], scale: 1, lost: new Map() };
Object.assign(view, { goTo });
window.segpipe = view; // for the browser's console, and tests

const image = () => viewer.world.getItemAt(0);
const labels = () => (view.slide?.labels ? viewer.world.getItemAt(1) : null);
const toFull = (u) => u * view.scale - 0.5;
const fromFull = (full) => (full + 0.5) / view.scale;

async function askJson(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

// --- an image -----------------------------------------------------------------------------------

async function show(key, place = {}) {
  const entry = view.slides.find((one) => one.key === key) ?? view.slides.find((one) => one.shown) ?? view.slides[0];
  if (!entry) return say("There are no images yet.");
  Object.assign(view, { current: entry, slide: null, lost: new Map() });
  Object.assign(style, { selected: 0 });
  viewer.close();
  markCurrent(entry.key);
  describe(entry);
  showRow(null, "Click on one.");
  showChannels([]);
  say();
  if (!entry.shown) return say(named(entry, entry.error ?? "not finished; load the page again later"));
  try {
    const url = new URL(`slides/${entry.key}/image.ome.zarr`, location.href.split("#")[0]).href;
    const [slide, told] = await Promise.all([
      openSlide(url, entry.labelled),
      askJson(`slides/${entry.key}/slide.json`),
    ]);
    if (view.current !== entry) return; // another one was chosen meanwhile
    Object.assign(view, { slide, scale: told.label_scale * slide.step });
    describe(entry, slide, told);
    const sources = [imageLayer(slide, lost(entry))];
    if (slide.labels) {
      const width = slide.labels.width / (slide.image.width * slide.step); // the image's last pixel may overhang
      sources.push({ tileSource: labelLayer(slide, style, lost(entry)), width });
    }
    await opened(sources);
  } catch (error) {
    return say(`${entry.name} cannot be shown: ${error.message}`);
  }
  showChannels(view.slide.channels, view.slide.dtype.startsWith("float"), () => repaint(image()));
  showOverlay();
  entry.failed_regions.forEach(frame);
  goTo(place);
}

/** A text that says of which image it is, once: errors name the file. */
const named = ({ name }, text) => (text.includes(name) ? text : `${name}: ${text}`);

/** Opens the layers; resolves when the viewer has them. */
function opened(sources) {
  return new Promise((resolve, reject) => {
    viewer.addOnceHandler("open", resolve);
    viewer.addOnceHandler("open-failed", ({ message }) => reject(new Error(message)));
    viewer.open(sources);
  });
}

/** Notes a tile that cannot be read, once, for as long as its image is shown. */
const lost = (entry) => (name, level, y, x, error) => {
  if (view.current !== entry) return;
  view.lost.set(`${name} ${level} ${y} ${x}`, error);
  say(`${view.lost.size} tiles of ${entry.name} cannot be read, and are hatched; the last: ` +
    `${name}, level ${level}, row ${y}, column ${x}: ${error}`);
};

function describe(entry, slide = null, told = null) {
  document.title = `${entry.name} - segpipe`;
  find("name").textContent = entry.name;
  const facts = [];
  if (entry.objects !== null) facts.push(countOf(entry));
  if (slide) {
    const shape = told.full_shape ?? [slide.image.height, slide.image.width].map((n) => Math.round(n * view.scale));
    const size = shape.map((n) => n.toLocaleString("en"));
    facts.push(`${size.join(" × ")} px`, slide.dtype);
    if (told.label_scale !== 1) facts.push(`worked on at 1 / ${Number(told.label_scale.toPrecision(4))}`);
    facts.push(told.pixel_size_um === null ? "pixel size not known" : `${Number(told.pixel_size_um.toPrecision(4))} µm per pixel`);
    if (told.model) facts.push(told.model);
  }
  find("facts").textContent = facts.join(" · ");
  const notes = [...(entry.error ? [entry.error] : []), ...entry.warnings];
  find("notes").replaceChildren(...notes.map((textContent) => make("li", { textContent })));
  find("preview").hidden = !entry.preview;
  find("preview").href = `slides/${entry.key}/preview.png`;
}

/** A frame around a region that failed. */
function frame({ box, stage, error }) {
  const [y0, x0, y1, x1] = box.map((n) => n / view.slide.step);
  const location = image().imageToViewportRectangle(x0, y0, x1 - x0, y1 - y0);
  viewer.addOverlay({ element: make("div", { className: "lost", title: `${stage}: ${error}` }), location });
}

// --- the overlay --------------------------------------------------------------------------------

function showOverlay() {
  labels()?.setOpacity(find("shown").checked ? find("opacity").valueAsNumber : 0);
}

function setMode(mode) {
  style.mode = mode;
  document.querySelector(`input[name="mode"][value="${mode}"]`).checked = true;
  if (labels()) repaint(labels());
}

async function select(id) {
  const { current } = view;
  style.selected = id;
  if (labels()) repaint(labels());
  keepPlace();
  if (!id) return void showRow(null, "Click on one.");
  try {
    const row = await askJson(`slides/${current.key}/objects/${id}.json`);
    if (style.selected === id && view.current === current) showRow(row);
    return row;
  } catch (error) {
    showRow(null, `${id}: ${error.message}`);
  }
}

/** Shows the object with this id in the middle, at full resolution or closer. */
async function goToObject(id) {
  const row = await select(id);
  if (row) goTo({ y: row.centroid_y_px, x: row.centroid_x_px, zoom: Math.max(zoom(), 1), id });
}

viewer.addHandler("canvas-click", async ({ quick, position }) => {
  if (!quick || !labels()) return;
  const { x, y } = image().viewportToImageCoordinates(viewer.viewport.pointFromPixel(position));
  const { slide } = view;
  const [v, u] = [y, x].map((n) => Math.floor(n * slide.step));
  const { height, width } = slide.labels;
  if (u < 0 || v < 0 || u >= width || v >= height) return;
  try {
    await select(await slide.idAt(v, u));
  } catch (error) {
    showRow(null, error.message);
  }
});

// --- the place, and links to it -----------------------------------------------------------------

/** Screen pixels for a pixel of full resolution. */
function zoom() {
  return image().viewportToImageZoom(viewer.viewport.getZoom()) / view.scale;
}

function goTo({ y, x, zoom, id }) {
  if (id && id !== style.selected) select(id);
  if (![y, x, zoom].every(Number.isFinite) || !(zoom > 0)) return;
  const target = image().imageToViewportCoordinates(fromFull(x), fromFull(y));
  viewer.viewport.zoomTo(image().imageToViewportZoom(zoom * view.scale), null, true);
  viewer.viewport.panTo(target, true);
}

function keepPlace() {
  if (!view.slide || !image()) return;
  const centre = image().viewportToImageCoordinates(viewer.viewport.getCenter());
  const place = new URLSearchParams({
    y: toFull(centre.y).toFixed(1), x: toFull(centre.x).toFixed(1), zoom: Number(zoom().toPrecision(5)),
  });
  if (style.selected) place.set("id", style.selected);
  history.replaceState(null, "", `#${view.current.key}?${place}`);
}

function placeInLink() {
  const [key, query] = location.hash.slice(1).split("?");
  const asked = Object.fromEntries([...new URLSearchParams(query)].map(([name, value]) => [name, Number(value)]));
  return [key, asked];
}

viewer.addHandler("animation-finish", keepPlace);
window.addEventListener("hashchange", () => show(...placeInLink()));

viewer.addHandler("update-viewport", () => {
  if (!view.slide || !image()) return;
  // Pixels as they are when enlarged, and no glitter when shrunk.
  viewer.drawer.setImageSmoothingEnabled(zoom() * view.scale < 1);
  const size = view.slide.pixelSizeUm;
  const { width, text } = size
    ? scaleBar((zoom() * view.scale) / size, "um")
    : scaleBar(zoom(), "px");
  find("scale").firstElementChild.textContent = text;
  find("scale").firstElementChild.style.width = `${width}px`;
});

find("canvas").addEventListener("pointermove", ({ offsetX, offsetY, target }) => {
  if (!view.slide || !image() || !find("canvas").contains(target)) return;
  const { left, top } = target.getBoundingClientRect();
  const own = find("canvas").getBoundingClientRect();
  const point = new OpenSeadragon.Point(offsetX + left - own.left, offsetY + top - own.top);
  const { x, y } = image().viewportToImageCoordinates(viewer.viewport.pointFromPixel(point));
  const at = [toFull(y), toFull(x)].map((n) => Math.round(n).toLocaleString("en"));
  find("place").textContent = `y ${at[0]}, x ${at[1]} px`;
});

// --- controls and keys --------------------------------------------------------------------------

find("shown").onchange = showOverlay;
find("opacity").oninput = showOverlay;
find("filter").oninput = ({ target }) => filterList(target.value);
for (const mode of document.getElementsByName("mode")) mode.onchange = () => setMode(mode.value);
find("find").onsubmit = (event) => {
  event.preventDefault();
  const id = Number(find("number").value);
  if (view.slide && id > 0) goToObject(id);
};

const pan = (x, y) => () =>
  viewer.viewport.panBy(viewer.viewport.deltaPointsFromPixels(new OpenSeadragon.Point(x, y)));
const zoomBy = (factor) => () => viewer.viewport.zoomBy(factor);
const fade = (step) => () => {
  find("opacity").value = find("opacity").valueAsNumber + step;
  showOverlay();
};
const step = (by) => () => {
  const next = view.slides[view.slides.indexOf(view.current) + by];
  if (next) show(next.key);
};

const KEYS = [
  ["←", "", "ArrowLeft", pan(-120, 0)],
  ["→", "", "ArrowRight", pan(120, 0)],
  ["↑", "", "ArrowUp", pan(0, -120)],
  ["↓", "pan", "ArrowDown", pan(0, 120)],
  ["+", "closer", "+", zoomBy(1.5)],
  ["-", "farther", "-", zoomBy(1 / 1.5)],
  ["0", "all of it", "0", () => viewer.viewport.goHome()],
  ["1", "full resolution", "1", () => viewer.viewport.zoomTo(image().imageToViewportZoom(view.scale))],
  ["l", "objects on, off", "l", () => find("shown").click()],
  ["o", "outlines, filled", "o", () => setMode(MODES[1 - MODES.indexOf(style.mode)])],
  ["[", "objects paler", "[", fade(-0.1)],
  ["]", "objects stronger", "]", fade(0.1)],
  ["n", "next image", "n", step(1)],
  ["p", "image before", "p", step(-1)],
  ["Esc", "select none", "Escape", () => select(0)],
];
find("keys").append(
  ...KEYS.flatMap(([key, told]) => [make("dt", { textContent: key }), make("dd", { textContent: told })]),
);
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches('input:not([type="checkbox"]):not([type="radio"])');
  if (typing || event.ctrlKey || event.altKey || event.metaKey) return;
  const found = KEYS.find(([, , key]) => key === event.key);
  if (!found || (!view.slide && !"np".includes(event.key))) return;
  event.preventDefault();
  found[3]();
});

try {
  const { folder, palette, slides } = await askJson("slides.json");
  style.palette = palette;
  view.slides = slides;
  find("slides").title = folder;
  showList(slides, show);
  await show(...placeInLink());
} catch (error) {
  say(`segpipe view does not answer (${error.message}); start it again, and use the address that it prints`);
}
