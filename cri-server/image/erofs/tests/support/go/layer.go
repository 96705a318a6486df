// Command layer writes a layer to standard output the way containerd and BuildKit do: entries in the PAX format, times in whole seconds unless
// they have more, no names of owners. With an argument, modes have the type of the file in them, as Docker writes them.
package main

import (
	"archive/tar"
	"os"
	"strings"
	"time"
)

func main() {
	at := time.Unix(1700000000, 0)
	long := strings.Repeat("directory/", 12)
	entries := []*tar.Header{
		{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755},
		{Name: "etc/passwd", Typeflag: tar.TypeReg, Mode: 0o644, Size: 700},
		{Name: "bin/ping", Typeflag: tar.TypeReg, Mode: 0o4755, Size: 3, Gid: 12,
			PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00", "SCHILY.xattr.user.b": "=\n"}},
		{Name: "bin/ping6", Typeflag: tar.TypeLink, Linkname: "bin/ping", Mode: 0o4755, Gid: 12,
			PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00", "SCHILY.xattr.user.b": "=\n"}},
		{Name: "lib", Typeflag: tar.TypeSymlink, Linkname: "usr/lib", Mode: 0o777},
		{Name: "dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666},
		{Name: "dev/sda", Typeflag: tar.TypeBlock, Devmajor: 8, Mode: 0o660},
		{Name: "run/fifo", Typeflag: tar.TypeFifo, Mode: 0o600},
		{Name: long, Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: long + "file", Typeflag: tar.TypeReg, Mode: 0o600, Size: 512},
		{Name: "./" + strings.Repeat("n", 97) + "/name", Typeflag: tar.TypeReg, Mode: 0o600},
		{Name: "sr\u00e9/\u4e16", Typeflag: tar.TypeReg, Mode: 0o600, Size: 1},
		{Name: "far", Typeflag: tar.TypeSymlink, Linkname: "/" + long + "file", Mode: 0o777},
		{Name: "owners", Typeflag: tar.TypeReg, Mode: 0o600, Uid: 1 << 21, Gid: 4294967294},
		{Name: "precise", Typeflag: tar.TypeReg, Mode: 0o600, ModTime: time.Unix(1700000000, 120000000)},
		{Name: "before", Typeflag: tar.TypeReg, Mode: 0o600, ModTime: time.Unix(-2, 500000000)},
		{Name: "old", Typeflag: tar.TypeReg, Mode: 0o600, ModTime: time.Unix(-7, 0)},
		{Name: "late", Typeflag: tar.TypeReg, Mode: 0o600, ModTime: time.Unix(1<<33, 0)},
		{Name: "etc/.wh.shadow", Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)},
	}
	types := map[byte]int64{tar.TypeReg: 0o100000, tar.TypeLink: 0o100000, tar.TypeDir: 0o40000, tar.TypeSymlink: 0o120000,
		tar.TypeChar: 0o20000, tar.TypeBlock: 0o60000, tar.TypeFifo: 0o10000}
	writer := tar.NewWriter(os.Stdout)
	for _, header := range entries {
		header.Format = tar.FormatPAX
		if len(os.Args) > 1 && !strings.Contains(header.Name, ".wh.") {
			header.Mode |= types[header.Typeflag]
		}
		if header.ModTime.IsZero() {
			header.ModTime = at
		}
		if err := writer.WriteHeader(header); err != nil {
			panic(err)
		}
		if _, err := writer.Write([]byte(strings.Repeat("x", int(header.Size)))); err != nil {
			panic(err)
		}
	}
	if err := writer.Close(); err != nil {
		panic(err)
	}
}
