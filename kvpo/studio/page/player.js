// Shows blocks one after the other on a canvas, at the generator's frame rate.

const SHARP = 128;   // longest side up to which pixels are shown as squares

export function paint(canvas, block, picture, frame) {
  const scale = picture.width / block.width;
  const height = picture.height / block.frames;
  const [width, tall] = [Math.round(block.width * scale), Math.round(height)];
  if (canvas.width !== width || canvas.height !== tall) {
    canvas.width = width;
    canvas.height = tall;
    canvas.classList.toggle("smooth", Math.max(block.width, block.height) > SHARP);
  }
  canvas.getContext("2d").drawImage(picture, 0, frame * height, picture.width, height, 0, 0, width, tall);
}

export class Player {
  // onBlock(block): its first frame is on the screen; onWaiting(): nothing to show
  constructor(canvas, onBlock) {
    this.canvas = canvas;
    this.onBlock = onBlock;
    this.fps = 16;
    this.waiting = [];     // blocks to be shown, with pictures on their way
    this.current = null;
    this.paused = false;
    this.shownAt = 0;
    requestAnimationFrame((now) => this.tick(now));
  }

  push(block) {
    const entry = { block, picture: null, frame: -1, begun: 0 };
    this.waiting.push(entry);
    createImageBitmap(block.strips[0]).then((picture) => { entry.picture = picture; });
  }

  // Forgets what has not been shown.
  clear() {
    for (const entry of [...this.waiting, this.current]) entry?.picture?.close();
    this.waiting = [];
    this.current = null;
  }

  async still(block, frame = 0) {
    const asked = this.asked = (this.asked ?? 0) + 1;
    const picture = await createImageBitmap(block.strips[0]);
    if (asked === this.asked) paint(this.canvas, block, picture, frame);   // the latest one asked for stays
    picture.close();
  }

  tick(now) {
    requestAnimationFrame((later) => this.tick(later));
    if (this.paused) {
      if (this.current) this.current.begun = now - this.current.frame * 1000 / this.fps;
      return;
    }
    let entry = this.current;
    if (entry) {
      const frame = Math.floor((now - entry.begun) * this.fps / 1000);
      if (frame < entry.block.frames) {
        if (frame > entry.frame) this.show(entry, frame);
        return;
      }
    }
    if (!this.waiting[0]?.picture) return;   // the last frame stays until there is more
    entry?.picture.close();
    entry = this.current = this.waiting.shift();
    entry.begun = now;
    this.show(entry, 0);
    this.onBlock(entry.block);
  }

  show(entry, frame) {
    entry.frame = frame;
    paint(this.canvas, entry.block, entry.picture, frame);
  }
}
