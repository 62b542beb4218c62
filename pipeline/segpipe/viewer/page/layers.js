// The two layers of the viewer: tiles of a slide that are painted anew when the settings change.
//
// OpenSeadragon keeps of a tile what `downloadTileStart` gave, here an object of type TILE, and what is
// drawn, which the converter makes of it. `repaint` makes it convert again.

import { paintChannels, paintIds, paintLost } from "./painting.js";

const { OpenSeadragon } = window;
const TILE = "segpipe-tile";

OpenSeadragon.converter.learn(TILE, TILE, (_, tile) => tile, 0, 1);
OpenSeadragon.converter.learn(TILE, "context2d", (_, tile) => paint(tile), 2, 3);

/** A layer of `slide`. `load(level, y, x)` gives a function that gives ImageData, now and later. */
export function layer(slide, pyramid, name, transparent, load, lost) {
  const [height, width] = pyramid.shape(0);
  const last = pyramid.arrays.length - 1;
  const source = new OpenSeadragon.TileSource({
    height, width, tileHeight: pyramid.tile[0], tileWidth: pyramid.tile[1], minLevel: 0, maxLevel: last,
  });
  source.getTileUrl = (level, x, y) => `${name}/${last - level}/${y}/${x}`;
  source.hasTransparency = () => transparent;
  source.downloadTileStart = async (job) => {
    const [level, y, x] = job.src.split("/").slice(-3).map(Number);
    const tile = { extent: pyramid.extent(level, y, x), lost: (error) => lost(name, level, y, x, error) };
    try {
      tile.draw = await load(level, y, x);
    } catch (error) {
      tile.error = error;
      tile.lost(error);
    }
    job.finish(tile, null, TILE);
  };
  source.downloadTileAbort = () => {}; // see Pyramid.chunk
  return source;
}

async function paint(tile) {
  const [height, width] = tile.extent;
  const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
  try {
    if (tile.error) throw tile.error;
    context.putImageData(await tile.draw(), 0, 0);
  } catch (error) {
    tile.lost(error);
    paintLost(context);
  }
  return context;
}

/** Layer of the image: channels that become active are read when they do. */
export function imageLayer(slide, lost) {
  return layer(slide, slide.image, "image", false, async (level, y, x) => {
    const planes = new Map();
    const draw = async () => {
      const active = [...slide.channels.keys()].filter((number) => slide.channels[number].active);
      const missing = active.filter((number) => !planes.has(number));
      const read = await Promise.all(missing.map((number) => slide.plane(level, number, y, x)));
      missing.forEach((number, i) => planes.set(number, read[i]));
      if (!active.length) return new ImageData(...slide.image.extent(level, y, x).reverse());
      return paintChannels(active.map((number) => planes.get(number)), active.map((number) => slide.channels[number]));
    };
    await draw();
    return draw;
  }, lost);
}

/** Layer of the objects; `style` says how they are painted. */
export function labelLayer(slide, style, lost) {
  return layer(slide, slide.labels, "labels", true, async (level, y, x) => {
    const tile = await slide.ids(level, y, x);
    return () => paintIds(tile, style);
  }, lost);
}

/** Lets a viewer convert tiles when they come and when `repaint` asks. */
export function paintsTiles(viewer) {
  viewer.addHandler("tile-invalidated", (event) => event.getData("context2d"));
}

const waiting = new WeakMap();

/** Paints the tiles of a layer anew; once more when asked while at it. */
export async function repaint(layer) {
  if (waiting.has(layer)) return void waiting.set(layer, true);
  waiting.set(layer, false);
  await layer.requestInvalidate(true);
  const again = waiting.get(layer);
  waiting.delete(layer);
  if (again) await repaint(layer);
}
