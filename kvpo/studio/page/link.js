// The socket: JSON both ways, blocks as binary messages, and going on after it was lost.

const RETRIES = [500, 1000, 2000, 4000, 8000];  // milliseconds

export class Link extends EventTarget {
  constructor() {
    super();
    this.received = 0;   // blocks, counted as the server counts what it sent
    this.seen = 0;
    this.tries = 0;
  }

  open() {
    const address = new URL("socket", document.baseURI);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    this.received = this.seen = 0;
    this.socket = new WebSocket(address);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.take(data);
    this.socket.onclose = (event) => this.lost(event);
  }

  take(data) {
    this.tries = 0;
    if (typeof data === "string") {
      const message = JSON.parse(data);
      this.dispatchEvent(new CustomEvent(message.is, { detail: message }));
      return;
    }
    this.received += 1;
    this.dispatchEvent(new CustomEvent("block", { detail: unpacked(data, this.received) }));
  }

  lost(event) {
    const wait = RETRIES[Math.min(this.tries, RETRIES.length - 1)];
    const again = event.code !== 1013 && event.code !== 1008;
    this.tries += 1;
    this.dispatchEvent(new CustomEvent("lost", { detail: { again, wait } }));
    if (again) setTimeout(() => this.open(), wait);
  }

  say(what, more = {}) {
    if (this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify({ do: what, ...more }));
    return true;
  }

  // Tells the server that a block, and all before it, need not be waited for any more.
  saw(serial) {
    if (serial <= this.seen || serial > this.received) return;
    this.seen = serial;
    this.say("seen", { blocks: serial });
  }
}

// Takes a block's message apart: 4 bytes of length, a JSON head, one film strip a row.
function unpacked(buffer, serial) {
  const length = new DataView(buffer).getUint32(0);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let at = 4 + length;
  const strips = head.sizes.map((size) => {
    const strip = new Blob([new Uint8Array(buffer, at, size)]);
    at += size;
    return strip;
  });
  return { ...head, strips, serial };
}
