// The golden vectors of the protocol.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { checkVectors } from '../vectors.js';

test('everything in protos/testdata', () => {
    assert.ok(checkVectors(fileURLToPath(new URL('../../../../protos/testdata', import.meta.url))));
});
