{{/* Names. Short enough for the longest suffix: the name of a StatefulSet is part of a label. */}}
{{- define "armillary.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "armillary.fullname" -}}
{{- $name := include "armillary.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change, since selectors cannot: (dict "root" $ "component" "control"). */}}
{{- define "armillary.selectorLabels" -}}
app.kubernetes.io/name: {{ include "armillary.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "armillary.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "armillary.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: armillary
app.kubernetes.io/managed-by: {{ .root.Release.Service | quote }}
{{- end -}}

{{- define "armillary.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* Where a component listens, its port added. [::] takes IPv4 too, where the Pod has any. */}}
{{- define "armillary.listen" -}}
{{ eq .Values.ipFamily "IPv6" | ternary "[::]" "0.0.0.0" }}
{{- end -}}

{{/* The service account of a component: (dict "root" $ "component" "control" "values" .Values.control). */}}
{{- define "armillary.serviceAccountName" -}}
{{- if .values.serviceAccount.name -}}
{{- .values.serviceAccount.name -}}
{{- else if .values.serviceAccount.create -}}
{{- printf "%s-%s" (include "armillary.fullname" .root) .component -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{/* A value as one types it. Numbers of a values file are floating: JSON writes 1000000, and not 1e+06. */}}
{{- define "armillary.text" -}}
{{- if kindIs "string" . -}}
{{- . -}}
{{- else -}}
{{- toJson . -}}
{{- end -}}
{{- end -}}

{{/* Fails where Helm has rounded a number as it read the values file: (dict "key" "seed" "value" 9007199254740992). */}}
{{- define "armillary.checkNumber" -}}
{{- if kindIs "float64" .value -}}
{{- if or (gt .value 9007199254740991.0) (lt .value -9007199254740991.0) -}}
{{- fail (printf "config.%s: Helm rounds numbers of this size: put it in quotes" .key) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What values cannot say together, and the schema cannot see. */}}
{{- define "armillary.check" -}}
{{- if not (toYaml (omit .Values "config" "taskFiles")) -}}
{{- fail "a value has a control character, for which Helm would write nothing at all" -}}
{{- end -}}
{{- if eq .Values.launcher "kubernetes" -}}
{{- if .Values.autoscaling.enabled -}}
{{- fail "launcher: kubernetes and autoscaling.enabled would both scale the spheres: choose one" -}}
{{- end -}}
{{- if .Values.zones -}}
{{- fail "launcher: kubernetes scales one Deployment, and zones make one for each zone: choose one" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled (gt (int64 .Values.autoscaling.minReplicas) (int64 .Values.autoscaling.maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas (%d) is above autoscaling.maxReplicas (%d)" (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and (hasKey .Values.config "epochs") (hasKey .Values.config "steps") -}}
{{- fail "config: give either epochs or steps, not both" -}}
{{- end -}}
{{- range $key, $value := .Values.config -}}
{{- include "armillary.checkNumber" (dict "key" $key "value" $value) -}}
{{- if kindIs "map" $value -}}
{{- range $name, $option := $value -}}
{{- include "armillary.checkNumber" (dict "key" (printf "%s.%s" $key $name) "value" $option) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $component, $values := dict "control" .Values.control "spheres" .Values.spheres -}}
{{- range $label := list "name" "instance" "component" "part-of" -}}
{{- if hasKey ($values.podLabels | default dict) (printf "app.kubernetes.io/%s" $label) -}}
{{- fail (printf "%s.podLabels: app.kubernetes.io/%s is the chart's" $component $label) -}}
{{- end -}}
{{- end -}}
{{- if and $.Values.taskFiles (hasKey ($values.podAnnotations | default dict) "checksum/task") -}}
{{- fail (printf "%s.podAnnotations: checksum/task is the chart's" $component) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.zones (hasKey (.Values.spheres.podLabels | default dict) "topology.kubernetes.io/zone") -}}
{{- fail "spheres.podLabels: with zones, topology.kubernetes.io/zone is the chart's" -}}
{{- end -}}
{{- end -}}

{{/* What Pods of both kinds have in common: (dict "root" $ "component" "control" "values" .Values.control). */}}
{{- define "armillary.podMetadata" -}}
{{- if or .values.podAnnotations .root.Values.taskFiles -}}
annotations:
  {{- with .root.Values.taskFiles }}
  # other files are other Pods
  checksum/task: {{ toJson . | sha256sum | quote }}
  {{- end }}
  {{- with .values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{ end -}}
labels:
  {{- include "armillary.selectorLabels" . | nindent 2 }}
  app.kubernetes.io/part-of: armillary
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "armillary.podSettings" -}}
serviceAccountName: {{ include "armillary.serviceAccountName" . | quote }}
# the variables that Kubernetes makes of services are not needed, and many
enableServiceLinks: false
terminationGracePeriodSeconds: {{ toJson .values.terminationGracePeriodSeconds }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .root.Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $selector := dict "matchLabels" (include "armillary.selectorLabels" $ | fromYaml) }}
  - {{- merge (deepCopy .) (dict "labelSelector" $selector) | toYaml | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "armillary.containerSettings" -}}
image: {{ include "armillary.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- with .root.Values.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- toYaml .values.resources | nindent 2 }}
ports:
  - name: grpc
    containerPort: {{ .port }}
# It has not listened yet: liveness is asked only after that.
startupProbe:
  grpc:
    port: {{ .port }}
    service: ""
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: {{ max 1 (div (int64 .values.startupSeconds) 2) }}
# Alive is who answers. Whoever has lost its parent is alive: it looks for another, and must not be killed for that.
livenessProbe:
  grpc:
    port: {{ .port }}
    service: ""
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
# Ready: control when the run has opened, a sphere while its link to a parent is up.
readinessProbe:
  grpc:
    port: {{ .port }}
    service: ready
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
{{- end -}}

{{- define "armillary.commonEnv" -}}
- name: ARMILLARY_LOG_FORMAT
  value: {{ .root.Values.logFormat }}
{{- if .root.Values.taskFiles }}
- name: PYTHONPATH
  value: /task
{{- end }}
{{- with .values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "armillary.commonMounts" -}}
# the root file system is read-only
- name: tmp
  mountPath: /tmp
{{- if .root.Values.taskFiles }}
- name: task
  mountPath: /task
  readOnly: true
{{- end }}
{{- with .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "armillary.commonVolumes" -}}
- name: tmp
  emptyDir: {}
{{- if .root.Values.taskFiles }}
- name: task
  configMap:
    name: {{ include "armillary.fullname" .root }}-task
{{- end }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "armillary.claim" -}}
accessModes:
  {{- toYaml .Values.checkpoints.accessModes | nindent 2 }}
{{- with .Values.checkpoints.storageClass }}
storageClassName: {{ . | quote }}
{{- end }}
resources:
  requests:
    storage: {{ include "armillary.text" .Values.checkpoints.size | quote }}
{{- end -}}
