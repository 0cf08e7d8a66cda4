package main

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"sort"
	"strconv"
	"strings"

	"github.com/golang/protobuf/jsonpb"
	"github.com/golang/protobuf/proto"

	pb "spheres/v1"
)

// checker compares what was computed with what is written, and keeps what differs.
type checker struct {
	count int
	wrong []string
}

func (c *checker) same(what string, got, want interface{}) {
	c.count++
	if !reflect.DeepEqual(got, want) {
		c.wrong = append(c.wrong, fmt.Sprintf("%s: %v, not %v", what, got, want))
	}
}

var checks = map[string]func([]byte, *checker) error{
	"control.json":    checkFrames,
	"digests.json":    checkDigests,
	"frames.json":     checkFrames,
	"randomness.json": checkRandomness,
	"rounding.json":   checkRounding,
	"shuffle.json":    checkShuffle,
	"sums.json":       checkSums,
}

// vectors checks every file of protos/testdata, a line each. Nobody may be missing, and nobody unknown.
func vectors(directory string, out io.Writer) error {
	found, err := os.ReadDir(directory)
	if err != nil {
		return usageError(fmt.Sprintf("cannot read %s; give protos/testdata of the source tree", directory))
	}
	names := map[string]bool{}
	for _, entry := range found {
		names[entry.Name()] = true
	}
	for name := range checks {
		names[name] = true
	}
	sorted := make([]string, 0, len(names))
	for name := range names {
		sorted = append(sorted, name)
	}
	sort.Strings(sorted)
	bad := 0
	for _, name := range sorted {
		var c checker
		if err := checkFile(filepath.Join(directory, name), &c); err != nil {
			c.wrong = append(c.wrong, err.Error())
		}
		if len(c.wrong) > 0 {
			bad++
			fmt.Fprintf(out, "%s: WRONG: %s\n", name, strings.Join(c.wrong, "; "))
		} else {
			fmt.Fprintf(out, "%s: %d checks passed\n", name, c.count)
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d files are wrong", bad, len(sorted))
	}
	return nil
}

func checkFile(path string, c *checker) error {
	check, known := checks[filepath.Base(path)]
	if !known {
		return fmt.Errorf("this client does not know what is in it")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := check(data, c); err != nil {
		return err
	}
	if c.count == 0 {
		return fmt.Errorf("nothing is in it")
	}
	return nil
}

// ---- messages

// checkFrames reads every message, writes it again, compares its content, and what is computed from bytes inside.
func checkFrames(data []byte, c *checker) error {
	var file struct {
		Frames []struct {
			Name, Message, Bytes string
			Value                json.RawMessage
		}
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return err
	}
	found := map[string]proto.Message{}
	for _, frame := range file.Frames {
		kind := proto.MessageType(frame.Message)
		if kind == nil {
			return fmt.Errorf("%s: no message %s", frame.Name, frame.Message)
		}
		message := reflect.New(kind.Elem()).Interface().(proto.Message)
		if err := proto.Unmarshal(unhex(frame.Bytes), message); err != nil {
			return fmt.Errorf("%s: %v", frame.Name, err)
		}
		again, err := proto.Marshal(message)
		if err != nil {
			return fmt.Errorf("%s: %v", frame.Name, err)
		}
		c.same(frame.Name+", written again", hex.EncodeToString(again), frame.Bytes)
		if frame.Value != nil {
			text, err := (&jsonpb.Marshaler{OrigName: true}).MarshalToString(message)
			if err != nil {
				return fmt.Errorf("%s: %v", frame.Name, err)
			}
			c.same(frame.Name+", its content", plain([]byte(text)), plain(frame.Value))
		}
		found[frame.Name] = message
	}
	if weights, ok := found["weights"].(*pb.WorkResponse); ok {
		gradient, ok := found["gradient"].(*pb.WorkRequest)
		if !ok {
			return fmt.Errorf("no gradient beside the weights")
		}
		chunk := weights.GetWeightsChunk()
		c.same("checksum of the weights", crc32c(chunk.GetData()), chunk.GetCrc32C())
		c.same("checksum of the gradient", crc32c(gradient.GetGradientChunk().GetData()), gradient.GetGradientChunk().GetCrc32C())
		digest := versionDigest(weights.GetWeightsHeader().GetManifestDigest(), []uint32{crc32c(chunk.GetData())})
		c.same("digest of the weights", digest, weights.GetWeightsFooter().GetDigest())
		c.same("digest of what the gradient was computed on", digest, gradient.GetGradientHeader().GetWeightsDigest())
	}
	if _, ok := found["download_weights_header"]; ok {
		parts := []string{"download_weights_header", "download_weights_chunk_0", "download_weights_chunk_1", "download_weights_footer"}
		weights, err := receive(func() (*pb.DownloadWeightsResponse, error) {
			if len(parts) == 0 {
				return nil, io.EOF
			}
			part, _ := found[parts[0]].(*pb.DownloadWeightsResponse)
			parts = parts[1:]
			return part, nil
		})
		if err != nil {
			return err
		}
		want := []float32{1, -2, 0.5, 0.25, 3}
		for i, t := range []int{0, 0, 0, 1, 1} {
			at := []int{0, 4, 8, 0, 4}[i]
			bits := binary.LittleEndian.Uint32(weights.tensorBytes(weights.tensors[t])[at:])
			c.same("a downloaded weight", math.Float32frombits(bits), want[i])
		}
	}
	return nil
}

// plain returns JSON as values that can be compared, whatever its spaces and order.
func plain(text []byte) (value interface{}) {
	if err := json.Unmarshal(text, &value); err != nil {
		return err
	}
	return value
}

// ---- recipes

func checkDigests(data []byte, c *checker) error {
	var file struct {
		Crc32c []struct{ Text, Crc32c string }

		Manifests []struct {
			Tensors  []*pb.Tensor
			Elements int64
			Text     string
			Digest   string
		}
		Versions []struct {
			ManifestDigest string `json:"manifest_digest"`
			ChunkBytes     int    `json:"chunk_bytes"`
			Flat           string
			Checksums      []string
			Digest         string
			Sha256         string `json:"sha256_without_padding"`
		}
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return err
	}
	for _, v := range file.Crc32c {
		c.same("CRC-32C of "+v.Text, fmt.Sprintf("%08x", crc32c([]byte(v.Text))), v.Crc32c)
	}
	known := map[string][]*pb.Tensor{}
	for _, v := range file.Manifests {
		c.same("text of a manifest", manifestText(v.Tensors), v.Text)
		c.same("digest of "+v.Text, hex.EncodeToString(manifestDigest(v.Tensors)), v.Digest)
		size, err := checkManifest(&pb.Manifest{Tensors: v.Tensors, Digest: unhex(v.Digest)})
		if err != nil {
			return err
		}
		c.same("size of "+v.Text, int64(size), 4*v.Elements)
		known[v.Digest] = v.Tensors
	}
	for _, v := range file.Versions {
		flat := unhex(v.Flat)
		texts, checksums := []string{}, []uint32{}
		for at := 0; at < len(flat); at += v.ChunkBytes {
			end := at + v.ChunkBytes
			if end > len(flat) {
				end = len(flat)
			}
			checksums = append(checksums, crc32c(flat[at:end]))
			texts = append(texts, fmt.Sprintf("%08x", crc32c(flat[at:end])))
		}
		c.same("checksums of "+v.Digest, texts, v.Checksums)
		c.same("digest of a version", hex.EncodeToString(versionDigest(unhex(v.ManifestDigest), checksums)), v.Digest)
		c.same("weights_sha256 of "+v.Digest, (&downloaded{tensors: known[v.ManifestDigest], flat: flat}).sum(), v.Sha256)
	}
	return nil
}

type leafSum struct {
	Leaves []*string
	Sum    *string
}

func (v leafSum) check(c *checker, rounded func(float32) float32) {
	leaves := make([]*float32, len(v.Leaves))
	for i, leaf := range v.Leaves {
		if leaf != nil {
			value := fromBits(*leaf)
			leaves[i] = &value
		}
	}
	got := canonicalSum(leaves, block{0, int64(len(leaves))}, rounded)
	if got == nil || v.Sum == nil {
		c.same("absent sum", got == nil, v.Sum == nil)
		return
	}
	c.same("sum", toBits(*got), *v.Sum)
}

func checkSums(data []byte, c *checker) error {
	var file struct {
		Decompositions []struct {
			Microbatches int64
			Range        [2]int64
			Blocks       [][2]int64
		}
		Sums  []leafSum
		Means []struct {
			Sum, Mean string
			Count     int
		}
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return err
	}
	for _, v := range file.Decompositions {
		blocks := [][2]int64{}
		for _, b := range (block{0, v.Microbatches}).decompose(v.Range[0], v.Range[1]) {
			blocks = append(blocks, [2]int64{b.lo, b.hi})
		}
		c.same(fmt.Sprintf("%v of %d", v.Range, v.Microbatches), blocks, v.Blocks)
	}
	for _, v := range file.Sums {
		v.check(c, asItIs)
	}
	for _, v := range file.Means {
		c.same("mean of "+v.Sum, toBits(fromBits(v.Sum)*float32(1/float64(v.Count))), v.Mean)
	}
	return nil
}

func checkRounding(data []byte, c *checker) error {
	var file struct {
		Bfloat16 []struct{ Value, Rounded, Wire string }
		Sums     []leafSum
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return err
	}
	for _, v := range file.Bfloat16 {
		got := toBits(bfloat16(fromBits(v.Value)))
		c.same(v.Value+" rounded", got, v.Rounded)
		c.same(v.Value+" on the wire", got[4:], v.Wire)
	}
	for _, v := range file.Sums {
		v.check(c, bfloat16)
	}
	return nil
}

func checkShuffle(data []byte, c *checker) error {
	var file struct {
		Mix64    []struct{ Word, Mixed string }
		Shuffles []struct {
			Seed        string
			Epoch, Size uint64
			Positions   []uint64
			Samples     []uint64
		}
		Microbatches []struct {
			Seed         string
			Size         uint64
			BatchSize    uint64 `json:"batch_size"`
			Microbatches uint64
			Step, Index  uint64
			Samples      []uint64
		}
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return err
	}
	for _, v := range file.Mix64 {
		c.same("mix of "+v.Word, fmt.Sprintf("%016x", mix(number(v.Word, 16))), v.Mixed)
	}
	for _, v := range file.Shuffles {
		samples := []uint64{}
		for _, position := range v.Positions {
			samples = append(samples, shuffle(number(v.Seed, 10), v.Epoch, v.Size, position))
		}
		c.same(fmt.Sprintf("seed %s, epoch %d", v.Seed, v.Epoch), samples, v.Samples)
	}
	for _, v := range file.Microbatches {
		samples := microbatch(number(v.Seed, 10), v.Size, v.BatchSize, v.Microbatches, v.Step, v.Index)
		c.same(fmt.Sprintf("step %d, microbatch %d", v.Step, v.Index), samples, v.Samples)
	}
	return nil
}

func checkRandomness(data []byte, c *checker) error {
	var file struct {
		FirstWords []struct {
			Seed        string
			Step, Index uint64
			Words       []string
		} `json:"first_words"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return err
	}
	for _, v := range file.FirstWords {
		words := []string{}
		for n := uint64(1); len(words) < len(v.Words); n++ { // it counts up before it makes four words
			for _, word := range philox([4]uint64{n, 0, 0, v.Index}, [2]uint64{number(v.Seed, 10), v.Step}) {
				words = append(words, fmt.Sprintf("%016x", word))
			}
		}
		c.same("words of seed "+v.Seed, words, v.Words)
	}
	return nil
}

// ---- values as the files write them

func unhex(text string) []byte {
	data, err := hex.DecodeString(text)
	if err != nil {
		return nil // whatever is computed from it will differ
	}
	return data
}

func number(text string, base int) uint64 {
	value, err := strconv.ParseUint(text, base, 64)
	if err != nil {
		return math.MaxUint64 // as above
	}
	return value
}

func fromBits(text string) float32 {
	data := append(unhex(text), 0, 0, 0, 0)
	return math.Float32frombits(binary.LittleEndian.Uint32(data))
}

func toBits(value float32) string {
	return hex.EncodeToString(binary.LittleEndian.AppendUint32(nil, math.Float32bits(value)))
}
