// Reads and paints the tiles of one slide at a time, beside the page, which stays free to pan and zoom.
// Every message is a question of pool.js, and is answered once.

import { paintChannels, paintIds, paintLost } from "./painting.js";
import { openSlide } from "./slide.js";

let shown = { url: null, slide: null }; // the slide: a promise

const paint = {
  async image(slide, level, y, x, channels) {
    const planes = await Promise.all(channels.map(({ number }) => slide.plane(level, number, y, x)));
    return { picture: paintChannels(planes, channels, ...slide.image.extent(level, y, x)), behind: [] };
  },
  async labels(slide, level, y, x, style) {
    const tile = await slide.ids(level, y, x);
    return { picture: paintIds(tile, style), behind: tile.behind };
  },
};

const answers = {
  async open(url, labelled) {
    shown = { url, slide: openSlide(url, labelled) };
    return (await shown.slide).told();
  },

  /** { bitmap, behind, error }: tiles to be painted anew, now that this one is known; where there is an
   * error, why the tile is hatched. */
  async paint(url, layer, level, y, x, look) {
    let slide;
    try {
      slide = await slideAt(url);
      const { picture, behind } = await paint[layer](slide, level, y, x, look);
      return { bitmap: await createImageBitmap(picture), behind };
    } catch (error) {
      const extent = slide?.[layer].extent(level, y, x) ?? [1, 1];
      return { bitmap: paintLost(...extent), behind: [], error: cause(error) };
    }
  },

  idAt: async (url, y, x) => (await slideAt(url)).idAt(y, x),
};

async function slideAt(url) {
  if (url !== shown.url) throw new Error("another image is shown now");
  return shown.slide;
}

const cause = (error) => error.cause?.message ?? error.message;

self.onmessage = async ({ data: { number, name, given } }) => {
  try {
    const answer = await answers[name](...given);
    self.postMessage({ number, answer }, answer.bitmap ? [answer.bitmap] : []);
  } catch (error) {
    self.postMessage({ number, error: cause(error) });
  }
};
