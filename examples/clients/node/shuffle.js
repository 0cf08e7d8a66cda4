/**
 * Which samples a microbatch holds: the stateless shuffle of docs/protocol-shuffle.md, and the random words that go
 * with it. Pure. Positions are few per microbatch, so each is looked up by itself: nothing of an epoch is kept.
 */

const MASK = (1n << 64n) - 1n;
const GOLDEN = 0x9e3779b97f4a7c15n;
const ROUNDS = 6;

/** @param {bigint} word */
export function mix(word) {
    word = ((word ^ (word >> 30n)) * 0xbf58476d1ce4e5b9n) & MASK;
    word = ((word ^ (word >> 27n)) * 0x94d049bb133111ebn) & MASK;
    return word ^ (word >> 31n);
}

/** The order of one epoch: a bijection of 0 .. size - 1, with random access. */
export class Order {
    #half = 1n;
    #size;
    /** @type {bigint[]} */
    #keys = [];

    /** @param {bigint} seed @param {bigint} epoch @param {bigint} size */
    constructor(seed, epoch, size) {
        this.#size = size;
        while (1n << (2n * this.#half) < size) this.#half++;
        const start = mix((mix((seed + GOLDEN) & MASK) + epoch) & MASK);
        for (let round = 1n; round <= ROUNDS; round++) this.#keys.push(mix((start + round * GOLDEN) & MASK));
    }

    /** The sample at a position below the size. @param {bigint} position */
    at(position) {
        const half = this.#half,
            lower = (1n << half) - 1n,
            keep = 64n - half;
        let x = position;
        do {
            let left = x >> half,
                right = x & lower;
            for (const key of this.#keys) [left, right] = [right, left ^ (mix((right + key) & MASK) >> keep)];
            x = (left << half) | right;
        } while (x >= this.#size);
        return x;
    }
}

/** Cuts steps into microbatches. Mutable state: the order of the epoch that was asked for last. */
export class Sampler {
    /** @type {{epoch: number, order: Order} | null} */
    #latest = null;

    /** @param {{seed: bigint, size: number, batchSize: number, microbatches: number}} run */
    constructor(run) {
        this.run = run;
        this.stepsPerEpoch = Math.ceil(run.size / run.batchSize);
    }

    /** The samples of microbatch `index` of a step, in their order; none where it is empty.
     * @param {number} step @param {number} index @returns {number[]} */
    microbatch(step, index) {
        const { seed, size, batchSize, microbatches } = this.run;
        const epoch = Math.floor(step / this.stepsPerEpoch),
            first = (step % this.stepsPerEpoch) * batchSize;
        const [lo, hi] = slice(Math.min(batchSize, size - first), microbatches, index);
        if (this.#latest?.epoch !== epoch)
            this.#latest = { epoch, order: new Order(seed, BigInt(epoch), BigInt(size)) };
        const { order } = this.#latest;
        return Array.from({ length: hi - lo }, (_, i) => Number(order.at(BigInt(first + lo + i))));
    }
}

/** Slice `index` of `parts` of so many: its bounds. Evaluation takes the test split in such slices, unshuffled.
 * @param {number} size @param {number} parts @param {number} index */
export const slice = (size, parts, index) => [
    Math.floor((index * size) / parts),
    Math.floor(((index + 1) * size) / parts),
];

/** The first random words of a microbatch: Philox4x64-10. `digits` draws none; a task with dropout would start here.
 * @param {bigint} seed @param {bigint} step @param {bigint} index @param {number} count */
export function randomWords(seed, step, index, count) {
    const words = /** @type {bigint[]} */ ([]);
    for (let number = 1n; words.length < count; number++) {
        let [c0, c1, c2, c3] = [number, 0n, 0n, index],
            [k0, k1] = [seed, step];
        for (let round = 0; round < 10; round++) {
            const p0 = c0 * 0xd2e7470ee14c6c93n,
                p1 = c2 * 0xca5a826395121157n;
            [c0, c1, c2, c3] = [(p1 >> 64n) ^ c1 ^ k0, p1 & MASK, (p0 >> 64n) ^ c3 ^ k1, p0 & MASK];
            k0 = (k0 + GOLDEN) & MASK;
            k1 = (k1 + 0xbb67ae8584caa73bn) & MASK;
        }
        words.push(c0, c1, c2, c3);
    }
    return words.slice(0, count);
}
