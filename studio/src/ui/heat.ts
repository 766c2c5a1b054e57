/** Colours of signed values, from a table of 511 that is made once for each theme, so that a pixel costs one look-up. */

import { rgbOf, type Rgb } from './colour';

const HALF = 255;

interface Picture {
  image: ImageData;
  pixels: Uint32Array;
}

const tables = new Map<string, Uint32Array>();
/** A canvas keeps its picture, so that a frame allocates nothing. */
const pictures = new WeakMap<HTMLCanvasElement, Picture>();

function mixed(from: Rgb, to: Rgb, share: number): number {
  const [r, g, b] = from.map((c, i) => Math.round(c + ((to[i] ?? 0) - c) * share)) as [number, number, number];
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
}

/** Entry HALF is zero, the ends are -1 and 1; a root lets small values be seen. Little-endian RGBA. */
export function colours(theme: string): Uint32Array {
  const made = tables.get(theme);
  if (made) return made;
  const [negative, zero, positive] = ['--negative', '--zero', '--positive'].map(rgbOf) as [Rgb, Rgb, Rgb];
  const table = Uint32Array.from({ length: 2 * HALF + 1 }, (_, i) =>
    mixed(zero, i < HALF ? negative : positive, Math.pow(Math.abs(i - HALF) / HALF, 0.75)),
  );
  tables.set(theme, table);
  return table;
}

function pictureOf(
  canvas: HTMLCanvasElement,
  context: CanvasRenderingContext2D,
  rows: number,
  columns: number,
): Picture {
  const kept = pictures.get(canvas);
  if (kept && kept.image.width === columns && kept.image.height === rows) return kept;
  canvas.width = columns;
  canvas.height = rows;
  const image = context.createImageData(columns, rows);
  const made = { image, pixels: new Uint32Array(image.data.buffer) };
  pictures.set(canvas, made);
  return made;
}

/** Draws rows x columns values on the canvas, one pixel each. */
export function painted(
  canvas: HTMLCanvasElement,
  values: ArrayLike<number>,
  rows: number,
  columns: number,
  limit: number,
  theme: string,
): void {
  const context = canvas.getContext('2d', { alpha: false });
  if (!context || rows === 0 || columns === 0) return;
  const { image, pixels } = pictureOf(canvas, context, rows, columns);
  const table = colours(theme);
  const factor = limit > 0 ? HALF / limit : 0;
  for (let i = 0; i < pixels.length; i++) {
    const at = Math.round((values[i] ?? 0) * factor);
    pixels[i] = table[HALF + (at > HALF ? HALF : at < -HALF ? -HALF : at)] as number;
  }
  context.putImageData(image, 0, 0);
}
