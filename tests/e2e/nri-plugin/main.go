// A plugin for tests, on the interface's own library: it tells what it hears, a JSON object on each line of its output, and does what lines
// of its input say.
//
//	fail EVENT          the next EVENT fails
//	hold EVENT          the next EVENT waits for "release"
//	mute EVENT          the next EVENT is never answered
//	release             goes on with what waits
//	adjust JSON         what the next containers are to be (see the type wishes); {} for nothing
//	update ID BYTES     another limit of memory for a container, at once
//	quit                leaves
//
// Flags: -socket PATH -index NN -name NAME -hold-synchronize. Started by the runtime, it has no flags and takes no input; its configuration
// is the path of a file to which it appends what it hears.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

type wishes struct {
	Env         map[string]string
	Args        []string
	Annotations map[string]string
	Mounts      []*api.Mount
	Rlimit      *api.POSIXRlimit
	Memory      int64
	OomScoreAdj *int
	Hook        string
	Sysctl      map[string]string
}

type told struct {
	Type       string
	Event      string   `json:",omitempty"`
	Pod        string   `json:",omitempty"`
	PodName    string   `json:",omitempty"`
	Namespace  string   `json:",omitempty"`
	Uid        string   `json:",omitempty"`
	Container  string   `json:",omitempty"`
	Name       string   `json:",omitempty"`
	State      string   `json:",omitempty"`
	Env        []string `json:",omitempty"`
	Pods       []string `json:",omitempty"`
	Containers []string `json:",omitempty"`
	Memory     int64    `json:",omitempty"`
	Words      string   `json:",omitempty"`
}

type plugin struct {
	sync.Mutex
	stub    stub.Stub
	out     *json.Encoder
	next    map[string]string
	release chan struct{}
	wishes  wishes
}

func (p *plugin) tell(what told) {
	p.Lock()
	defer p.Unlock()
	if p.out != nil {
		if err := p.out.Encode(what); err != nil {
			os.Exit(1)
		}
	}
}

// What an event is to come to.
func (p *plugin) act(event string) error {
	p.Lock()
	what, release := p.next[event], p.release
	delete(p.next, event)
	p.Unlock()
	switch what {
	case "fail":
		return errors.New("told to fail " + event)
	case "hold":
		<-release
	case "mute":
		select {}
	}
	return nil
}

func (p *plugin) pod(event string, pod *api.PodSandbox) error {
	p.tell(told{Type: "event", Event: event, Pod: pod.GetId(), PodName: pod.GetName(), Namespace: pod.GetNamespace(), Uid: pod.GetUid()})
	return p.act(event)
}

func (p *plugin) container(event string, pod *api.PodSandbox, c *api.Container) error {
	p.tell(told{
		Type: "event", Event: event, Pod: pod.GetId(), PodName: pod.GetName(), Container: c.GetId(), Name: c.GetName(),
		State: c.GetState().String(), Env: c.GetEnv(), Memory: c.GetLinux().GetResources().GetMemory().GetLimit().GetValue(),
	})
	return p.act(event)
}

func (p *plugin) Configure(_ context.Context, config, runtime, version string) (api.EventMask, error) {
	if config != "" {
		file, err := os.OpenFile(strings.TrimSpace(config), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return 0, err
		}
		p.out = json.NewEncoder(file)
	}
	p.tell(told{Type: "configured", Name: runtime, Words: version})
	return 0, nil
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	sync := told{Type: "synchronized"}
	for _, pod := range pods {
		sync.Pods = append(sync.Pods, pod.GetId())
	}
	for _, c := range containers {
		sync.Containers = append(sync.Containers, c.GetId())
	}
	p.tell(sync)
	return nil, p.act("Synchronize")
}

func (p *plugin) Shutdown(context.Context) { p.tell(told{Type: "shutdown"}) }

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.pod("RunPodSandbox", pod)
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.pod("StopPodSandbox", pod)
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.pod("RemovePodSandbox", pod)
}

func (p *plugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, _, _ *api.LinuxResources) error {
	return p.pod("UpdatePodSandbox", pod)
}

func (p *plugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.pod("PostUpdatePodSandbox", pod)
}

func (p *plugin) CreateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	if err := p.container("CreateContainer", pod, c); err != nil {
		return nil, nil, err
	}
	p.Lock()
	defer p.Unlock()
	adjust := &api.ContainerAdjustment{}
	for key, value := range p.wishes.Env {
		if name, gone := api.IsMarkedForRemoval(key); gone {
			adjust.RemoveEnv(name)
		} else {
			adjust.AddEnv(key, value)
		}
	}
	if len(p.wishes.Args) > 0 {
		adjust.SetArgs(p.wishes.Args)
	}
	for key, value := range p.wishes.Annotations {
		adjust.AddAnnotation(key, value)
	}
	for _, mount := range p.wishes.Mounts {
		adjust.AddMount(mount)
	}
	if limit := p.wishes.Rlimit; limit != nil {
		adjust.AddRlimit(limit.Type, limit.Hard, limit.Soft)
	}
	if p.wishes.Memory != 0 {
		adjust.SetLinuxMemoryLimit(p.wishes.Memory)
	}
	if p.wishes.OomScoreAdj != nil {
		adjust.SetLinuxOomScoreAdj(p.wishes.OomScoreAdj)
	}
	if p.wishes.Hook != "" {
		adjust.AddHooks(&api.Hooks{Prestart: []*api.Hook{{Path: p.wishes.Hook}}})
	}
	for key, value := range p.wishes.Sysctl {
		adjust.SetLinuxSysctl(key, value)
	}
	return adjust, nil, nil
}

func (p *plugin) PostCreateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.container("PostCreateContainer", pod, c)
}

func (p *plugin) StartContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.container("StartContainer", pod, c)
}

func (p *plugin) PostStartContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.container("PostStartContainer", pod, c)
}

func (p *plugin) UpdateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container, r *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	if err := p.container("UpdateContainer", pod, c); err != nil {
		return nil, err
	}
	p.Lock()
	defer p.Unlock()
	if p.wishes.Memory == 0 {
		return nil, nil
	}
	update := &api.ContainerUpdate{}
	update.SetContainerId(c.GetId())
	update.SetLinuxMemoryLimit(p.wishes.Memory)
	return []*api.ContainerUpdate{update}, nil
}

func (p *plugin) PostUpdateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.container("PostUpdateContainer", pod, c)
}

func (p *plugin) StopContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, p.container("StopContainer", pod, c)
}

func (p *plugin) RemoveContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	return p.container("RemoveContainer", pod, c)
}

func (p *plugin) obey(line string) error {
	verb, rest, _ := strings.Cut(line, " ")
	switch verb {
	case "fail", "hold", "mute":
		p.Lock()
		p.next[rest] = verb
		p.Unlock()
	case "release":
		p.Lock()
		close(p.release)
		p.release = make(chan struct{})
		p.Unlock()
	case "adjust":
		var wanted wishes
		if err := json.Unmarshal([]byte(rest), &wanted); err != nil {
			return err
		}
		p.Lock()
		p.wishes = wanted
		p.Unlock()
	case "update":
		id, text, _ := strings.Cut(rest, " ")
		bytes, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return err
		}
		update := &api.ContainerUpdate{}
		update.SetContainerId(id)
		update.SetLinuxMemoryLimit(bytes)
		failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{update})
		if err != nil {
			return err
		}
		if len(failed) > 0 {
			return errors.New("the update failed")
		}
	case "quit":
		os.Exit(0)
	default:
		return fmt.Errorf("unknown command %q", verb)
	}
	return nil
}

func (p *plugin) read() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := ""
		if err := p.obey(lines.Text()); err != nil {
			words = err.Error()
		}
		p.tell(told{Type: "done", Words: words})
	}
	os.Exit(0)
}

func main() {
	socket := flag.String("socket", "", "where the runtime serves")
	index := flag.String("index", "00", "two digits")
	name := flag.String("name", "test", "of the plugin")
	held := flag.Bool("hold-synchronize", false, "the first synchronization waits for release")
	flag.Parse()
	p := &plugin{next: map[string]string{}, release: make(chan struct{})}
	options := []stub.Option{stub.WithOnClose(func() {
		p.tell(told{Type: "closed"})
		os.Exit(0)
	})}
	if *held {
		p.next["Synchronize"] = "hold"
	}
	if *socket != "" {
		p.out = json.NewEncoder(os.Stdout)
		options = append(options, stub.WithSocketPath(*socket), stub.WithPluginIdx(*index), stub.WithPluginName(*name))
		go p.read()
	}
	var err error
	if p.stub, err = stub.New(p, options...); err == nil {
		err = p.stub.Run(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "nri-plugin:", err)
		os.Exit(1)
	}
}
