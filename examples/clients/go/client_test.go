package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "spheres/v1"
)

const testdata = "../../../protos/testdata"

func TestVectorsPassAndASpoiltFileDoesNot(t *testing.T) {
	var out bytes.Buffer
	if err := vectors(testdata, &out); err != nil {
		t.Fatal(err, out.String())
	}
	for _, name := range []string{"control.json", "sums.json", "shuffle.json"} {
		folder := t.TempDir()
		for file := range checks {
			data, err := os.ReadFile(filepath.Join(testdata, file))
			if err != nil {
				t.Fatal(err)
			}
			if file == name { // another number somewhere
				data = bytes.Replace(data, []byte("3"), []byte("5"), 40)
			}
			if err := os.WriteFile(filepath.Join(folder, file), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		out.Reset()
		if err := vectors(folder, &out); err == nil || !strings.Contains(out.String(), name+": WRONG: ") {
			t.Errorf("%s was spoilt: %v\n%s", name, err, out.String())
		}
	}
	if err := vectors(t.TempDir(), io.Discard); err == nil {
		t.Error("a folder without files passes")
	}
}

func TestNamesInTheTextOfAManifest(t *testing.T) {
	for name, want := range map[string]string{
		`a"b\c`: `"a\"b\\c"`, "größe": `"gr\u00f6\u00dfe"`, "\n\x01": `"\n\u0001"`, "😀": `"\ud83d\ude00"`, "\x7f": "\"\x7f\"",
	} {
		if got := nameText(name); got != want {
			t.Errorf("%q: %s, not %s", name, got, want)
		}
	}
}

// sent returns a download of one tensor of 20 elements in two chunks.
func sent() []*pb.DownloadWeightsResponse {
	tensors := []*pb.Tensor{{Name: "w", Shape: []int64{20}, Dtype: "float32"}}
	flat := make([]byte, 128)
	for i := range flat[:80] {
		flat[i] = byte(i)
	}
	w := downloaded{tensors: tensors, flat: flat}
	return []*pb.DownloadWeightsResponse{
		{Manifest: &pb.Manifest{Tensors: tensors, Digest: manifestDigest(tensors)}, WeightsVersion: 7},
		{Data: flat[:64], Crc32C: crc32c(flat[:64])},
		{OffsetBytes: 64, Data: flat[64:], Crc32C: crc32c(flat[64:])},
		{WeightsSha256: w.sum()},
	}
}

func received(messages []*pb.DownloadWeightsResponse) (*downloaded, error) {
	return receive(func() (*pb.DownloadWeightsResponse, error) {
		if len(messages) == 0 {
			return nil, io.EOF
		}
		next := messages[0]
		messages = messages[1:]
		return next, nil
	})
}

func TestADownloadIsTakenWholeOrNotAtAll(t *testing.T) {
	if _, err := received(sent()); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func([]*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse{
		"nothing":      func(m []*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse { return nil },
		"no footer":    func(m []*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse { return m[:3] },
		"cut off":      func(m []*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse { return m[:2] },
		"a chunk less": func(m []*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse { return append(m[:1], m[2:]...) },
		"twice":        func(m []*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse { return append(m[:3], m[2], m[3]) },
		"checksum":     func(m []*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse { m[1].Crc32C++; return m },
		"sha256": func(m []*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse {
			m[3].WeightsSha256 = "00"
			return m
		},
		"layout": func(m []*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse {
			m[0].Manifest.Tensors[0].Shape[0] = 21
			return m
		},
		"dtype": func(m []*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse {
			m[0].Manifest.Tensors[0].Dtype = "int8"
			return m
		},
		"other weights": func(m []*pb.DownloadWeightsResponse) []*pb.DownloadWeightsResponse {
			m[1].Data = bytes.Repeat([]byte{1}, 64)
			m[1].Crc32C = crc32c(m[1].Data)
			return m
		},
	} {
		if _, err := received(spoil(sent())); err == nil {
			t.Errorf("%s: it was taken", name)
		}
	}
}

func TestTheFileIsSafetensorsAndReplacesTheOneBefore(t *testing.T) {
	w, err := received(sent())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "w.safetensors")
	if err := os.WriteFile(path, []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.write(path); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	size := binary.LittleEndian.Uint64(data)
	var header map[string]struct {
		Offsets []int `json:"data_offsets"`
	}
	if err := json.Unmarshal(data[8:8+size], &header); err != nil {
		t.Fatal(err)
	}
	if size%8 != 0 || !bytes.Equal(data[8+size:], w.flat[:80]) || header["w"].Offsets[1] != 80 {
		t.Errorf("%d %v %d", size, header, len(data))
	}
	entries, _ := os.ReadDir(filepath.Dir(path))
	if len(entries) != 1 {
		t.Errorf("something is left over: %v", entries)
	}
	if err := w.write(filepath.Join(path, "below a file")); err == nil {
		t.Error("written below a file")
	}
}

func TestExitCodesAreThoseOfControlCli(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{usageError("x"), 2},
		{unreachableError("x"), 5},
		{io.ErrUnexpectedEOF, 1},
		{status.Error(codes.FailedPrecondition, "RunStateError: the run is completed"), 6},
		{status.Error(codes.DataLoss, "CheckpointError: cut"), 4},
		{status.Error(codes.FailedPrecondition, "no"), 5},
		{status.Error(codes.Internal, "boom"), 1},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v: %d, not %d", c.err, got, c.want)
		}
	}
	if got := words(status.Error(codes.FailedPrecondition, "RunStateError: the run is completed")); got != "the run is completed" {
		t.Error(got)
	}
}

func TestTheEndOfAWatch(t *testing.T) {
	for record, want := range map[string]bool{
		`{"state": "running"}`: false, `{"state": "completed"}`: true, `{"state": "error", "x": 1}`: true, `{`: false,
	} {
		if got := isEnd(&pb.WatchRunResponse{Event: "state", RecordJson: record}); got != want {
			t.Error(record, got)
		}
	}
}
