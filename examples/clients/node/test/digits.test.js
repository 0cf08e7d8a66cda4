// The gradient against that of the Python task: gradients.json is made by make_gradients.py.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { Digits } from '../digits.js';
import { TaskError } from '../errors.js';
import { Sampler, slice } from '../shuffle.js';
import { elementsOf, flatSize } from '../wire.js';

const data = fileURLToPath(new URL('../../../../spheres/tasks/data/digits.csv.gz', import.meta.url));
const {
    seed,
    batch_size: batchSize,
    microbatches,
    cases,
} = JSON.parse(readFileSync(new URL('gradients.json', import.meta.url), 'utf8'));

const near = (own, theirs, scale) => assert.ok(Math.abs(own - theirs) <= 1e-5 * scale, `${own}, not ${theirs}`);

for (const { hidden, step, microbatch, tensors, sums, evaluation } of cases) {
    test(`hidden=${hidden}, step ${step}, microbatch ${microbatch}`, () => {
        const task = new Digits(data, { hidden }, tensors);
        const flat = new Float32Array(flatSize(tensors)),
            out = new Float32Array(flat.length);
        for (const tensor of tensors) {
            const count = elementsOf(tensor),
                rows = tensor.shape[0];
            for (let i = 0; i < count; i++)
                flat[tensor.offset + i] = ((((7919 * i) % 2003) / 2003 - 0.5) * 4) / Math.sqrt(rows);
        }
        const sampler = new Sampler({ seed: BigInt(seed), size: task.size('train'), batchSize, microbatches });
        const own = task.gradient(flat, sampler.microbatch(step, microbatch), out);
        near(own.loss, sums[0], sums[0]);
        assert.deepEqual([own.count, own.metrics.accuracy], sums.slice(1));
        for (const { name, shape, offset, norm, elements } of tensors) {
            const view = out.subarray(offset, offset + elementsOf({ name, shape, offset, dtype: 'float32' }));
            near(Math.hypot(...view), norm, norm);
            for (const [place, value] of Object.entries(elements))
                near(view[place], value, Math.max(...view.map(Math.abs)));
        }
        const [lo, hi] = slice(task.size('test'), microbatches, microbatch);
        const tested = task.evaluate(
            flat,
            Array.from({ length: hi - lo }, (_, i) => lo + i),
        );
        near(tested.loss, evaluation[0], evaluation[0]);
        assert.deepEqual([tested.count, tested.metrics.accuracy], evaluation.slice(1));
    });
}

test('a model or an option of another kind is refused', () => {
    const { tensors } = cases[0];
    assert.throws(() => new Digits(data, { hidden: '32' }, tensors), TaskError);
    assert.throws(() => new Digits(data, { hidden: '64,x' }, tensors), TaskError);
    assert.throws(() => new Digits(data, { layers: '64' }, tensors), TaskError);
    assert.throws(() => new Digits('/nowhere', { hidden: '64' }, tensors), TaskError);
});
