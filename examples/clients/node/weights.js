/** One version of the weights: how it arrives, its digest, and whether it is whole (N17). */
import { ProtocolError } from './errors.js';
import { chunkRange } from './config.js';
import { crc32c, fromWire, itemSize, versionDigest } from './wire.js';

export class Weights {
    version = -1;
    term = 0;
    /** chunks 0 .. arrived - 1 are here and fit their checksums */
    arrived = 0;
    /** every chunk is here and the footer's digest agreed: only now may it be used */
    complete = false;
    digest = Buffer.alloc(0);

    /** @param {import('./config.js').Config} config */
    constructor(config) {
        this.config = config;
        this.flat = new Float32Array(new SharedArrayBuffer(4 * config.size));
        this.checksums = new Uint32Array(config.chunkCount);
    }

    /** Chunks of an interrupted version to go on from. */
    get resumable() {
        return this.complete ? 0 : this.arrived;
    }

    /** @param {any} header @param {{term: number, version: number}} of */
    begin(header, { term, version }) {
        if (!this.config.manifestDigest.equals(header.manifest_digest))
            throw new ProtocolError('weights of another layout');
        if (header.held_digest.length) {
            if (!this.complete || version !== this.version || !this.digest.equals(header.held_digest)) {
                throw new ProtocolError(`the parent takes weights v${version} as held; held: ${this}`);
            }
            this.term = term;
            return;
        }
        const same = term === this.term && version === this.version;
        if (header.from_chunk && !(same && header.from_chunk === this.arrived)) {
            throw new ProtocolError(`weights v${version} go on at chunk ${header.from_chunk}; held: ${this}`);
        }
        Object.assign(this, { term, version, arrived: header.from_chunk, complete: false, digest: Buffer.alloc(0) });
    }

    /** @param {any} chunk */
    put({ index, offset_bytes: offset, data, crc32c: checksum }) {
        const [first, end] = chunkRange(this.config, this.arrived);
        const expected =
            !this.complete && index === this.arrived && index < this.checksums.length && Number(offset) === 4 * first;
        if (!expected || data.length !== (end - first) * itemSize(this.config.weightsDtype)) {
            throw new ProtocolError(
                `weights chunk ${index} at byte ${offset} with ${data.length} bytes; held: ${this}`,
            );
        }
        if (crc32c(data) !== checksum) throw new ProtocolError(`weights chunk ${index} does not fit its checksum`);
        fromWire(data, this.config.weightsDtype, this.flat.subarray(first, end));
        this.checksums[index] = checksum;
        this.arrived++;
    }

    /** @param {Buffer} digest the footer's */
    finish(digest) {
        const own = this.arrived === this.checksums.length && versionDigest(this.config.manifestDigest, this.checksums);
        if (!own || !own.equals(digest)) {
            this.arrived = 0; // none of it can be gone on from
            throw new ProtocolError(
                `weights v${this.version} do not have the footer's digest ${digest.toString('hex')}`,
            );
        }
        this.digest = own;
        this.complete = true;
    }

    toString() {
        return `v${this.version}, ${this.arrived} of ${this.checksums.length} chunks${this.complete ? ', whole' : ''}`;
    }
}
