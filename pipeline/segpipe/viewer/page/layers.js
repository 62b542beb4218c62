// The two layers of the viewer: tiles of a slide that are painted anew when the settings change.
//
// OpenSeadragon keeps of a tile what `downloadTileStart` gave, here an object of type TILE, and what is
// drawn, which the converter makes of it, here of type PICTURE. `repaint` makes it convert again.

const { OpenSeadragon } = window;
const TILE = "segpipe-tile";
const PICTURE = "segpipe-picture"; // { canvas }: an ImageBitmap, which is drawn as a canvas is

OpenSeadragon.converter.learn(TILE, TILE, (_, tile) => tile, 0, 1);
OpenSeadragon.converter.learn(TILE, PICTURE, (_, tile) => picture(tile), 2, 3);
OpenSeadragon.converter.learnDestroy(PICTURE, ({ canvas }) => canvas.close());

/** Draws the pictures that the workers gave, without a copy of each. */
export class Drawer extends OpenSeadragon.CanvasDrawer {
  getSupportedDataFormats() {
    return [PICTURE];
  }
}

/** A layer of `slide`, image or labels; `look()` says how it is painted now. */
function layer(slide, name, look, lost) {
  const { height, width, tile, levels } = slide[name];
  const source = new OpenSeadragon.TileSource({
    height, width, tileHeight: tile[0], tileWidth: tile[1], minLevel: 0, maxLevel: levels - 1,
  });
  source.getTileUrl = (level, x, y) => `${name}/${levels - 1 - level}/${y}/${x}`;
  source.hasTransparency = () => name === "labels";
  const known = new Map(); // by url: tiles (the navigator has its own), and how often they fell behind
  const at = (url) => known.get(url) ?? known.set(url, { tiles: new Set(), times: 0 }).get(url);
  source.downloadTileStart = async (job) => {
    const place = job.src.split("/").slice(-3).map(Number);
    const own = at(job.src);
    own.tiles.add(job.tile);
    const state = () => JSON.stringify([own.times, look()]);
    const paint = async () => {
      const asked = state();
      const { bitmap, behind, error } = await slide.paint(name, ...place, look());
      if (error !== undefined) lost(name, ...place, error);
      catchUp(behind.map((one) => at(`${name}/${one}`)));
      return { bitmap, current: () => asked === state() };
    };
    try {
      job.finish({ paint, painted: await paint() }, null, TILE);
    } catch (error) {
      lost(name, ...place, error.message);
      job.fail(error.message);
    }
  };
  source.downloadTileAbort = () => {}; // see Pyramid.chunk
  return source;
}

/** Paints tiles anew that were painted before one beside them was known. */
function catchUp(places) {
  for (const place of places) {
    place.times++;
    const tiles = [...place.tiles].filter((tile) => tile.loaded || tile.processing);
    const world = tiles[0]?.tiledImage.viewer.world;
    world?.requestTileInvalidateEvent(tiles, OpenSeadragon.now());
  }
}

/** The picture of a tile: the one that it came with, if the settings are still those. */
async function picture(tile) {
  const { bitmap } = tile.painted?.current() ? tile.painted : await tile.paint();
  tile.painted = null;
  return { canvas: bitmap };
}

/** Layer of the image: channels that become active are read when they do. */
export function imageLayer(slide, lost) {
  const active = () =>
    slide.channels.flatMap(({ active, low, high, colour }, number) => (active ? [{ number, low, high, colour }] : []));
  return layer(slide, "image", active, lost);
}

/** Layer of the objects; `style` says how they are painted. */
export function labelLayer(slide, style, lost) {
  return layer(slide, "labels", () => ({ ...style }), lost);
}

/** Lets a viewer convert tiles when they come and when `repaint` asks. */
export function paintsTiles(viewer) {
  viewer.addHandler("tile-invalidated", (event) => event.getData(PICTURE));
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
