package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"

	pb "spheres/v1"
)

// saveWeights downloads the weights between two steps and writes them, whole or not at all.
func saveWeights(ctx context.Context, c *client, o options, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, longDeadline)
	defer cancel()
	stream, err := c.stub.DownloadWeights(ctx, &pb.DownloadWeightsRequest{})
	if err != nil {
		return c.meant(err)
	}
	weights, err := receive(stream.Recv)
	if err != nil {
		return c.meant(err)
	}
	if err := weights.write(o.file); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s: weights of version %d, sha256 %s\n", o.file, weights.version, weights.sha256)
	return nil
}

// downloaded is one version of the weights: its layout, and the flat buffer.
type downloaded struct {
	tensors []*pb.Tensor
	version int64
	sha256  string
	flat    []byte
}

// receive takes header, chunks and footer, and checks all of it. What is cut off is discarded.
func receive(next func() (*pb.DownloadWeightsResponse, error)) (*downloaded, error) {
	first, err := next()
	if err == io.EOF {
		return nil, unreachableError("control ended the download before it began; try again")
	}
	if err != nil {
		return nil, err
	}
	w := &downloaded{tensors: first.GetManifest().GetTensors(), version: first.WeightsVersion}
	size, err := checkManifest(first.GetManifest())
	if err != nil {
		return nil, err
	}
	w.flat = make([]byte, 0, size)
	sum := ""
	for message := first; ; {
		if len(message.Data) > 0 {
			if message.OffsetBytes != int64(len(w.flat)) || len(w.flat)+len(message.Data) > size || crc32c(message.Data) != message.Crc32C {
				return nil, fmt.Errorf("the download of the weights is corrupt at byte %d; try again", message.OffsetBytes)
			}
			w.flat = append(w.flat, message.Data...)
		}
		if message.WeightsSha256 != "" {
			sum = message.WeightsSha256
		}
		if message, err = next(); err == io.EOF {
			break
		} else if err != nil {
			return nil, err
		}
	}
	if len(w.flat) != size || w.sum() != sum {
		return nil, fmt.Errorf("the weights that arrived are not those that were sent; download them again")
	}
	w.sha256 = sum
	return w, nil
}

// tensorBytes are those of one tensor in the flat buffer, without the padding behind it.
func (w *downloaded) tensorBytes(t *pb.Tensor) []byte {
	return w.flat[4*t.Offset : 4*(t.Offset+elements(t.Shape))]
}

// sum returns weights_sha256: all tensors back to back, without padding.
func (w *downloaded) sum() string {
	all := sha256.New()
	for _, tensor := range w.tensors {
		all.Write(w.tensorBytes(tensor))
	}
	return hex.EncodeToString(all.Sum(nil))
}

// checkManifest returns the size of the flat buffer in bytes, once digest and offsets are those of the recipe.
func checkManifest(manifest *pb.Manifest) (int, error) {
	next := int64(0)
	for _, tensor := range manifest.GetTensors() {
		n := elements(tensor.Shape)
		if tensor.Dtype != "float32" || tensor.Offset != next || n < 0 || n > 1<<40 || next > 1<<40 {
			return 0, fmt.Errorf("the layout of the weights is wrong at tensor %q", tensor.Name)
		}
		next = (next + n + 15) / 16 * 16
	}
	if !bytes.Equal(manifestDigest(manifest.GetTensors()), manifest.GetDigest()) {
		return 0, fmt.Errorf("the layout of the weights does not fit its digest; is control of the same release?")
	}
	return int(4 * next), nil
}

// write makes a safetensors file: the length of the header, the header as JSON, then all tensors back to back.
func (w *downloaded) write(path string) (err error) {
	header := map[string]interface{}{"__metadata__": map[string]string{
		"weights_version": fmt.Sprint(w.version), "weights_sha256": w.sha256,
	}}
	at := int64(0)
	for _, tensor := range w.tensors {
		size := 4 * elements(tensor.Shape)
		shape := tensor.Shape
		if shape == nil {
			shape = []int64{} // a scalar's is [], not null
		}
		header[tensor.Name] = map[string]interface{}{"dtype": "F32", "shape": shape, "data_offsets": []int64{at, at + size}}
		at += size
	}
	head, err := json.Marshal(header)
	if err != nil {
		return err
	}
	head = append(head, bytes.Repeat([]byte(" "), (8-len(head)%8)%8)...)

	// to another name first: at the path there is the whole file, or what was there before
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return fmt.Errorf("cannot write %s: %v", path, err)
	}
	defer func() {
		if err != nil {
			file.Close()
			os.Remove(file.Name())
			err = fmt.Errorf("cannot write %s: %v", path, err)
		}
	}()
	if err = binary.Write(file, binary.LittleEndian, uint64(len(head))); err != nil {
		return err
	}
	if _, err = file.Write(head); err != nil {
		return err
	}
	for _, tensor := range w.tensors {
		if _, err = file.Write(w.tensorBytes(tensor)); err != nil {
			return err
		}
	}
	if err = file.Chmod(0o644); err != nil {
		return err
	}
	if err = file.Sync(); err != nil {
		return err
	}
	if err = file.Close(); err != nil {
		return err
	}
	return os.Rename(file.Name(), path)
}
