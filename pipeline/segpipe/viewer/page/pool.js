// The workers, and a slide as the page sees it: what it is, and pictures of its tiles.

// One for the labels, of which each tile needs the edges of those beside it, and the others for the image.
const COUNT = Math.min(Math.max(navigator.hardwareConcurrency ?? 2, 2), 4);

const asked = new Map(); // by number: { resolve, reject } of questions that are not answered yet
let last = 0;

const workers = Array.from({ length: COUNT }, () => {
  const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data: { number, answer, error } }) => {
    const { resolve, reject } = asked.get(number);
    asked.delete(number);
    if (error === undefined) resolve(answer);
    else reject(new Error(error));
  };
  worker.onerror = (event) => {
    for (const { reject } of asked.values()) reject(new Error(event.message ?? "a worker does not start"));
    asked.clear();
  };
  return worker;
});

function ask(worker, name, ...given) {
  return new Promise((resolve, reject) => {
    asked.set(++last, { resolve, reject });
    worker.postMessage({ number: last, name, given });
  });
}

/** The worker of a tile: always the same, which still has its pixels when it is painted anew. */
const workerOf = (layer, y, x) => workers[layer === "labels" ? 0 : 1 + ((x + y) % (COUNT - 1))];

/** Opens the OME-Zarr below `url`: what slide.js tells of it, and
 *
 *     paint(layer, level, y, x, look)    { bitmap, behind, error } of a tile, see worker.js
 *     idAt(y, x)                         the object at a pixel of the labels' level 0; 0 for none
 */
export async function openSlide(url, labelled) {
  const [told] = await Promise.all(workers.map((worker) => ask(worker, "open", url, labelled)));
  return {
    ...told,
    paint: (layer, level, y, x, look) => ask(workerOf(layer, y, x), "paint", url, layer, level, y, x, look),
    idAt: (y, x) => ask(workerOf("labels"), "idAt", url, y, x),
  };
}
