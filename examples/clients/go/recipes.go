package main

// The recipes of docs/protocol.md and docs/protocol-shuffle.md, to the bit.

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"math/bits"
	"strings"
	"unicode/utf16"

	pb "spheres/v1"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crc32c(data []byte) uint32 { return crc32.Checksum(data, castagnoli) }

// elements returns how many numbers a tensor has, -1 where that is beyond reason.
func elements(shape []int64) int64 {
	n := int64(1)
	for _, axis := range shape {
		if axis < 0 || (axis > 0 && n > (1<<40)/axis) {
			return -1
		}
		n *= axis
	}
	return n
}

// manifestText is what the digest of a manifest is taken over.
func manifestText(tensors []*pb.Tensor) string {
	rows := make([]string, len(tensors))
	for i, t := range tensors {
		rows[i] = fmt.Sprintf(`[%s,[%s],%d,"float32"]`, nameText(t.Name), joined(t.Shape), t.Offset)
	}
	return "[" + strings.Join(rows, ",") + "]"
}

func manifestDigest(tensors []*pb.Tensor) []byte {
	digest := sha256.Sum256([]byte(manifestText(tensors)))
	return digest[:16]
}

// nameText returns a name as JSON in ASCII; what is not ASCII is \uxxxx, beyond 16 bits two of them.
func nameText(name string) string {
	short := map[rune]string{'"': `\"`, '\\': `\\`, '\b': `\b`, '\f': `\f`, '\n': `\n`, '\r': `\r`, '\t': `\t`}
	var out strings.Builder
	for _, r := range name {
		if text, ok := short[r]; ok {
			out.WriteString(text)
		} else if r >= ' ' && r <= '~' || r == 0x7f {
			out.WriteRune(r)
		} else if high, low := utf16.EncodeRune(r); high != 0xfffd {
			fmt.Fprintf(&out, `\u%04x\u%04x`, high, low)
		} else {
			fmt.Fprintf(&out, `\u%04x`, r)
		}
	}
	return `"` + out.String() + `"`
}

func joined(numbers []int64) string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(numbers), " ", ","), "[]")
}

// versionDigest is the digest of a version of the weights: over the manifest's, then the checksum of every chunk.
func versionDigest(manifest []byte, checksums []uint32) []byte {
	all := append([]byte{}, manifest...)
	for _, checksum := range checksums {
		all = binary.LittleEndian.AppendUint32(all, checksum)
	}
	digest := sha256.Sum256(all)
	return digest[:16]
}

// ---- canonical blocks and their sums

type block struct{ lo, hi int64 }

// halves cuts a block at the largest power of two below its width.
func (b block) halves() (block, block) {
	half := int64(1) << (bits.Len64(uint64(b.hi-b.lo-1)) - 1)
	return block{b.lo, b.lo + half}, block{b.lo + half, b.hi}
}

// decompose returns the largest canonical blocks below b that lie in [lo, hi).
func (b block) decompose(lo, hi int64) []block {
	if hi <= b.lo || b.hi <= lo {
		return nil
	}
	if lo <= b.lo && b.hi <= hi {
		return []block{b}
	}
	left, right := b.halves()
	return append(left.decompose(lo, hi), right.decompose(lo, hi)...)
}

// canonicalSum adds left + right at every node; absent (nil) + x is x as it stands. rounded is what becomes of each
// leaf and each sum: nothing, or bfloat16.
func canonicalSum(leaves []*float32, b block, rounded func(float32) float32) *float32 {
	if b.hi-b.lo == 1 {
		if leaves[b.lo] == nil {
			return nil
		}
		leaf := rounded(*leaves[b.lo])
		return &leaf
	}
	leftHalf, rightHalf := b.halves()
	left, right := canonicalSum(leaves, leftHalf, rounded), canonicalSum(leaves, rightHalf, rounded)
	if left == nil {
		return right
	}
	if right == nil {
		return left
	}
	sum := rounded(*left + *right)
	return &sum
}

func asItIs(value float32) float32 { return value }

// bfloat16 keeps the upper half of a float32, rounded to nearest, ties to even.
func bfloat16(value float32) float32 {
	w := math.Float32bits(value)
	if value != value {
		return math.Float32frombits(w&0xffff0000 | 0x400000) // a NaN stays one
	}
	return math.Float32frombits((w + 0x7fff + (w >> 16 & 1)) & 0xffff0000)
}

// ---- which samples

const golden = 0x9E3779B97F4A7C15

func mix(x uint64) uint64 {
	x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
	x = (x ^ (x >> 27)) * 0x94D049BB133111EB
	return x ^ (x >> 31)
}

// shuffle returns the sample at a position of an epoch: a Feistel network, entered again until it is one.
func shuffle(seed, epoch, size, position uint64) uint64 {
	h := 1
	for uint64(1)<<(2*h) < size {
		h++
	}
	start := mix(mix(seed+golden) + epoch)
	for x := position; ; {
		left, right := x>>h, x&(1<<h-1)
		for r := uint64(1); r <= 6; r++ {
			left, right = right, left^(mix(right+mix(start+r*golden))>>(64-h))
		}
		if x = left<<h | right; x < size {
			return x
		}
	}
}

// microbatch returns the samples of microbatch k of m in a step.
func microbatch(seed, size, batch, m, step, k uint64) []uint64 {
	perEpoch := (size + batch - 1) / batch
	first := step % perEpoch * batch
	if batch > size-first {
		batch = size - first
	}
	samples := []uint64{}
	for position := first + k*batch/m; position < first+(k+1)*batch/m; position++ {
		samples = append(samples, shuffle(seed, step/perEpoch, size, position))
	}
	return samples
}

// philox is Philox4x64-10 of Salmon and others: four random words of a counter and a key.
func philox(c [4]uint64, key [2]uint64) [4]uint64 {
	for round := 0; round < 10; round++ {
		high0, low0 := bits.Mul64(0xD2E7470EE14C6C93, c[0])
		high1, low1 := bits.Mul64(0xCA5A826395121157, c[2])
		c = [4]uint64{high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0}
		key[0] += golden
		key[1] += 0xBB67AE8584CAA73B
	}
	return c
}
